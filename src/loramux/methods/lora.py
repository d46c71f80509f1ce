"""LoRA: one expert per linear, no router. y = W0 x + s B^T (A x), s = alpha / r.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685.
`use_rslora`: s = alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
`use_dora`: y = c * (W0 x + s B^T A x) with c = m / ||W0 + s B^T A|| per output row, the norm held constant in the
gradient (Liu et al., DoRA, ICML 2024, arXiv 2402.09353).
"""

from dataclasses import dataclass

from loramux.core.method import Method, MethodConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """Fields and meaning are PEFT's. `lora_alpha` defaults to 16."""

    method = "lora"


class LoraMethod(Method):
    name = "lora"
    title = "LoRA"
    paper = "arXiv 2106.09685"
    granularity = "linear"
    routing_unit = "none"
    servability = "static"
    config_class = LoraConfig
    default_learning_rate = 2e-4


METHOD = LoraMethod
