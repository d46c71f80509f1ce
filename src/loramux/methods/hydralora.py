"""HydraLoRA: one A shared by N heads B_i at every linear, mixed softly by a gate that reads the linear's input.

Tian et al., HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, NeurIPS 2024,
arXiv 2404.19245. For an input x and gate G [E, I]:

    w = softmax(G x)                          in fp32
    y = W0 x + s sum_i w_i B_i^T (A x)        A x once per call

With dropout the released code draws a mask per head and multiplies A by each of the masked inputs; here one mask holds
for all heads, so that A x stays one product.

Letters: E heads, I input width of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.core.mixing import DenseConfig, GatedMethod
from loramux.core.types import Site


@dataclass(frozen=True, kw_only=True)
class HydraLoRAConfig(DenseConfig):
    """Defaults are the released script's: r 4, alpha 32, dropout 0.05, 4 heads, on the linears of the FFN.

    The paper's main row is r 8 with 3 heads, and its parameter counts fit target_modules [q_proj, v_proj].
    """

    method = "hydralora"

    r: int = 4
    lora_dropout: float = 0.05
    num_experts: int = 4

    def default_alpha(self) -> float:
        return 32.0


class HydraLoRAMethod(GatedMethod):
    name = "hydralora"
    title = "HydraLoRA"
    paper = "arXiv 2404.19245"
    granularity = "head B at a linear, A shared"
    config_class = HydraLoRAConfig
    default_learning_rate = 2e-4
    config: HydraLoRAConfig

    def usual_sites(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.kind == "ffn"]

    def tied_experts(self, site: Site) -> int:
        return self.config.num_experts


METHOD = HydraLoRAMethod
