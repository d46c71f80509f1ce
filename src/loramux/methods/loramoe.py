"""LoRAMoE: N LoRA experts at every linear of the FFN behind a soft gate; a loss keeps two kinds of data on two halves.

Dou et al., LoRAMoE: Alleviating World Knowledge Forgetting in Large Language Models via MoE-Style Plugin, ACL 2024,
arXiv 2312.09979. For an input x and gate G [E, I]:

    w = softmax(G x)                                     in fp32
    y = W0 x + s sum_i w_i B_i^T A_i x

Localised balancing over the E experts and the Q samples of a batch, whose type is 0 or 1:

    Q_in = sum of w_i over the real tokens of sample n
    I_in = 1 + delta if expert i lies in n's half, else 1 - delta
    Z    = Q * I ;  L = beta * var(Z) / (mean(Z)^2 + 1e-10)

Small L makes w proportional to 1/I, so with the signs above, the released code's, a sample's own half ends with a share
of (1 - delta)/2, below one half. `lbc_orientation="specialise"` swaps them: (1 + delta)/2.

Letters: E experts, Q samples, I input width of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from loramux.core.mixing import (
    DenseConfig,
    GatedMethod,
    LinearGate,
    Orientation,
    importance,
    localised_weights,
    spread,
)
from loramux.core.router import Router, RouteView
from loramux.core.types import Route, RouteRecord, Site
from loramux.core.values import check_not_negative, check_share

EVERY_OTHER = "*"
NO_TYPE = -1


@dataclass(frozen=True, kw_only=True)
class LoRAMoEConfig(DenseConfig):
    """Defaults are the released script's (r 4, alpha 32, dropout 0.05, 8 experts); blc_* are ours, it leaves them at 0.

    blc_alpha is delta, blc_weight beta. sample_types: {task of a row: 1 for world knowledge, 0 for the rest}; "*"
    stands for every task it does not name. Without it no sample has a type and the loss only evens out the experts.
    attention_lora: targeted linears of the attention hold one plain LoRA without a gate, as MoE-PEFT trains it.
    """

    method = "loramoe"

    r: int = 4
    lora_dropout: float = 0.05
    num_experts: int = 8
    blc_alpha: float = 0.1
    blc_weight: float = 0.1
    sample_types: Mapping[str, int] = field(default_factory=dict)
    lbc_orientation: Literal["code", "specialise"] = "code"
    aux_reduction: Literal["mean", "sum"] = "mean"
    attention_lora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("blc_alpha", self.blc_alpha)
        check_not_negative("blc_weight", self.blc_weight)
        types = self.sample_types
        if not isinstance(types, Mapping) or not all(
            isinstance(task, str) and type(kind) is int and kind in (0, 1)
            for task, kind in types.items()
        ):
            raise ValueError(
                f"sample_types must map names of tasks to 0 or 1, got {self.sample_types!r}"
            )
        if types and self.blc_weight and self.num_experts % 2:
            raise ValueError(
                f"sample_types split the experts into halves: num_experts must be even, got {self.num_experts}"
            )

    def default_alpha(self) -> float:
        return 32.0

    def type_of(self, task: str | None) -> int:
        """0 or 1; -1 where no types are asked for."""
        types = self.sample_types
        if not types:
            return NO_TYPE
        found = types.get(EVERY_OTHER) if task is None else types.get(task, types.get(EVERY_OTHER))
        if found is None:
            raise ValueError(
                f"sample_types knows the tasks {list(types)}, a row has {task!r}; name it there, or give '*' for all "
                "others"
            )
        return found


class TypedGate(LinearGate):
    """Refuses a training step whose samples have no type before anything is computed from it."""

    def __init__(self, config: LoRAMoEConfig, d_in: int):
        super().__init__(
            config.num_experts,
            d_in,
            top_k_at_inference=config.top_k_at_inference,
            init_range=config.router_init_range,
        )
        self.config = config

    def forward(self, view: RouteView, incoming: Route) -> Route:
        if view.training and self.config.blc_weight and self.config.sample_types:
            for request in torch.unique(view.request_N[view.valid_N]).tolist():
                self.config.type_of(None if view.tasks is None else view.tasks[request])
        return super().forward(view, incoming)


class LoRAMoEMethod(GatedMethod):
    name = "loramoe"
    title = "LoRAMoE"
    paper = "arXiv 2312.09979"
    config_class = LoRAMoEConfig
    default_learning_rate = 2e-4
    config: LoRAMoEConfig

    def usual_sites(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.kind == "ffn"]

    def is_plain(self, site: Site) -> bool:
        return self.config.attention_lora and site.kind != "ffn"

    def num_experts_at(self, site: Site) -> int:
        return 1 if self.is_plain(site) else self.config.num_experts

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        return super().routers([site for site in sites if not self.is_plain(site)])

    def gate_at(self, site: Site) -> LinearGate:
        return TypedGate(self.config, site.d_in)

    def check_training_task(self, task: str | None) -> None:
        if self.config.blc_weight:
            self.config.type_of(task)

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        """beta * the localised constraint, mean (or sum) over linears."""
        config = self.config
        if not records or not config.blc_weight:
            return {}
        terms = torch.stack([localised_balance(record, config) for record in records])
        value = terms.sum() if config.aux_reduction == "sum" else terms.mean()
        return {"localised": config.blc_weight * value}


def localised_balance(record: RouteRecord, config: LoRAMoEConfig) -> Tensor:
    """var(Z) / mean(Z)^2 of one linear. Padding counts nowhere, and neither do requests of other adapters."""
    assert record.probs is not None and record.valid is not None and record.request is not None
    sums_QE, own_Q = importance(record.probs, record.request, record.valid)
    return spread(sums_QE * _weights(record, own_Q, config).to(sums_QE))


def _weights(record: RouteRecord, own_Q: Tensor, config: LoRAMoEConfig) -> Tensor:
    orientation: Orientation = config.lbc_orientation
    tasks = record.tasks
    # Outside training a batch may come without tasks: its loss is only shown.
    types = [NO_TYPE if tasks is None else config.type_of(tasks[q]) for q in own_Q.tolist()]
    type_Q = torch.tensor(types, dtype=torch.long, device=own_Q.device)
    return localised_weights(type_Q, config.num_experts, config.blc_alpha, orientation)


METHOD = LoRAMoEMethod
