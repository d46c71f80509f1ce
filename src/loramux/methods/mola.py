"""MoLA: LoRA experts at every linear, more of them in higher layers; a gate takes two per token.

Gao et al., Higher Layers Need More LoRA Experts, Findings of NAACL 2025, arXiv 2402.08562. For an input x, gate
G [E, I] and E = the number of experts of this layer:

    p = softmax(G x)                          in fp32
    w = the two largest of p, renormalised to sum 1, the others 0
    y = W0 x + s sum_i w_i B_i^T A_i x

Loss: coefficient * the balance of each linear, 1 when balanced (share of selections times mean probability, times E).

Letters: E experts of a layer, I input width of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loramux.core.mixing import GateConfig, GatedMethod, LinearGate, selection_balance
from loramux.core.types import RouteRecord, Site
from loramux.core.values import check_not_negative, check_whole

PAPERS_BEST = (2, 4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class MoLAConfig(GateConfig):
    """Defaults are the released code's: r 8, alpha 16, dropout 0.05, two experts per token, loss coefficient 1e-3.

    experts_per_layer: numbers of experts from the lowest to the highest targeted layers, spread evenly over them: four
    numbers are four quarters, as many numbers as layers are one each, more are refused. (2, 4, 6, 8) is the paper's
    best, and taken as quarters even by models of fewer than four layers.
    """

    method = "mola"

    r: int = 8
    lora_dropout: float = 0.05
    experts_per_layer: tuple[int, ...] = PAPERS_BEST
    top_k: int = 2
    router_aux_loss_coef: float = 1e-3
    aux_reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.experts_per_layer, list):
            object.__setattr__(self, "experts_per_layer", tuple(self.experts_per_layer))
        if not isinstance(self.experts_per_layer, tuple) or not self.experts_per_layer:
            raise ValueError(
                "experts_per_layer must be a list of numbers, from the lowest to the highest layers, got "
                f"{self.experts_per_layer!r}"
            )
        for number in self.experts_per_layer:
            check_whole("experts_per_layer", number)
        check_whole("top_k", self.top_k)
        check_not_negative("router_aux_loss_coef", self.router_aux_loss_coef)


class MoLAMethod(GatedMethod):
    name = "mola"
    title = "MoLA"
    paper = "arXiv 2402.08562"
    config_class = MoLAConfig
    default_learning_rate = 3e-4
    config: MoLAConfig

    def __init__(self, config: MoLAConfig):
        super().__init__(config)
        self._experts: dict[int, int] = {}

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Also where the numbers meet the layers: `experts` is asked afterwards."""
        layers = sorted({site.layer for site in sites})
        numbers = self.config.experts_per_layer
        if len(numbers) > len(layers) and numbers != PAPERS_BEST:
            raise ValueError(
                f"experts_per_layer has {len(numbers)} numbers for {len(layers)} layers with targeted linears, so some "
                f"would go unused; give at most {len(layers)}"
            )
        self._experts = spread_over(numbers, layers)

    def num_experts_at(self, site: Site) -> int:
        return self._experts[site.layer]

    def gate_at(self, site: Site) -> LinearGate:
        config = self.config
        return LinearGate(
            self.num_experts_at(site),
            site.d_in,
            top_k=config.top_k,
            init_range=config.router_init_range,
        )

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        config = self.config
        if not records or not config.router_aux_loss_coef:
            return {}
        terms = []
        for record in records:
            assert record.probs is not None and record.valid is not None
            terms.append(selection_balance(record.gates, record.probs, record.valid))
        total = torch.stack(terms)
        value = total.sum() if config.aux_reduction == "sum" else total.mean()
        return {"balance": config.router_aux_loss_coef * value}


def spread_over(numbers: Sequence[int], layers: Sequence[int]) -> dict[int, int]:
    """Layer -> number of experts: place i of L layers takes entry i * len(numbers) // L."""
    return {
        layer: numbers[place * len(numbers) // len(layers)] for place, layer in enumerate(layers)
    }


METHOD = MoLAMethod
