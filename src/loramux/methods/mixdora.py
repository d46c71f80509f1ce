"""MixDoRA: MixLoRA whose experts, in the FFN and in the attention, are DoRA modules.

Li et al., MixLoRA, arXiv 2404.15159; DoRA: Liu et al., arXiv 2402.09353. With c = m / ||W + s B^T A|| per output row
and expert, the norm held constant in the gradient, expert e of the FFN is

    u_e = act(c1_e (W1 x + s B1_e^T A1_e x)) * c3_e (W3 x + s B3_e^T A3_e x)
    y   = sum_k w_k c2_k (W2 u_k + s B2_k^T A2_k u_k)

Each expert rescales the base product of the last linear, so this one is needed per token and expert, not per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux.methods.mixlora import MixLoRAConfig, MixLoRAMethod


@dataclass(frozen=True, kw_only=True)
class MixDoRAConfig(MixLoRAConfig):
    """MixLoRA's fields; use_dora is on."""

    method = "mixdora"

    use_dora: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_dora:
            raise ValueError(
                "mixdora is mixlora with DoRA experts: leave use_dora on, or take method mixlora"
            )


class MixDoRAMethod(MixLoRAMethod):
    name = "mixdora"
    title = "MixDoRA"
    config_class = MixDoRAConfig
    config: MixDoRAConfig


METHOD = MixDoRAMethod
