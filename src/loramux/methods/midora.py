"""MiDoRA: MiLoRA whose experts are DoRA modules. A row of MiLoRA's tables, without equations of its own.

Zhang et al., MiLoRA, arXiv 2410.18035; DoRA: Liu et al., arXiv 2402.09353. For a chosen module, g = 1:

    y = c * (W x + s B^T A x)                 c = m / ||W + s B^T A|| per output row, the norm held constant

A module that is not chosen, g = 0, is the bare linear: its magnitudes rescale nothing (the reading taken here).
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux.methods.milora import MiLoRAConfig, MiLoRAMethod


@dataclass(frozen=True, kw_only=True)
class MiDoRAConfig(MiLoRAConfig):
    """MiLoRA's fields; use_dora is on."""

    method = "midora"

    use_dora: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_dora:
            raise ValueError(
                "midora is milora with DoRA experts: leave use_dora on, or take method milora"
            )


class MiDoRAMethod(MiLoRAMethod):
    name = "midora"
    title = "MiDoRA"
    config_class = MiDoRAConfig
    config: MiDoRAConfig


METHOD = MiDoRAMethod
