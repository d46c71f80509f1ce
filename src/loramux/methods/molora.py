"""MoLoRA: N LoRA experts at every linear, all of them mixed softly by a gate that reads the linear's input.

Zadouri et al., Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient
MoE for Instruction Tuning, ICLR 2024, arXiv 2309.05444. For an input x and gate G [E, I]:

    w = softmax(G x)                          in fp32, nothing is left out
    y = W0 x + s sum_i w_i B_i^T A_i x

The paper's other half, MoV, mixes (IA)^3 vectors. These scale the base's output and are no LoRA, so it is not here.

Letters: E experts, I input width of a linear, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux.core.bank import Rows
from loramux.core.mixing import DenseConfig, GatedMethod
from loramux.core.types import Site

START_STD = 0.02  # of A


@dataclass(frozen=True, kw_only=True)
class MoLoRAConfig(DenseConfig):
    """Defaults are the released code's: r 4, alpha 16, 10 experts, gates and A normal with deviation 0.02."""

    method = "molora"

    r: int = 4
    num_experts: int = 10
    router_init_range: float | None = START_STD


class MoLoRAMethod(GatedMethod):
    name = "molora"
    title = "MoLoRA"
    paper = "arXiv 2309.05444"
    config_class = MoLoRAConfig
    default_learning_rate = 3e-4
    config: MoLoRAConfig

    def start_rows(self, site: Site, rows: Rows) -> None:
        if self.config.init_lora_weights is True:
            torch.nn.init.normal_(rows.a, std=START_STD)


METHOD = MoLoRAMethod
