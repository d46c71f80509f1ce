"""LoRA-Flow: a gate per decoder layer weighs frozen trained LoRAs anew at every token; only the gates are trained.

Wang, Ping, Wang, Han, Chen, Liu, Sun, LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in Generative Tasks,
ACL 2024, arXiv 2402.11455. With x the input of the decoder layer (the residual stream before its norm) and u the
input of any of its linears:

    w = softmax( W x / T ) + b       W [E, D] starts at 0, b [E] at c - 1/E
    y = W0 u + sum_i w_i s_i B_i^T A_i u

The bias is outside the softmax: the weights sum to 1 + sum b, may be negative, and start exactly at c, one-hot at the
task's adapter in the paper. W and b decide in fp32, since residual norms grow with depth.

Letters: N tokens, D width of what the gate reads, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.frozen import FrozenConfig
from loramux.core.method import Method
from loramux.core.router import Router, RouteView, mean_over
from loramux.core.types import Route, RouteRecord, Servability, Site
from loramux.core.values import check_not_negative, check_positive

ANCHOR = "anchor:"


@dataclass(frozen=True, kw_only=True)
class LoRAFlowConfig(FrozenConfig):
    """granularity: "layer" a gate per decoder layer, the paper's; "module" one per linear, reading that linear's input;
    "step" one for all layers, reading the input of the first.

    init: "anchor:NAME" starts as that adapter alone (the paper's, with the task's adapter); "uniform" at 1/E each.
    static: W is left out, which isolates what weighing token by token is worth. bias_inside: b inside the softmax, an
    ablation. lora_dropout: dropout on the adapters' inputs in training (the authors left theirs, 0.1, on).
    sum_penalty_coef: of (sum w - 1)^2, mean over tokens and gates; not the paper's.
    """

    method = "loraflow"

    granularity: Literal["layer", "module", "step"] = "layer"
    init: str = "uniform"
    temperature: float = 1.0
    static: bool = False
    bias_inside: bool = False
    sum_penalty_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)
        check_not_negative("sum_penalty_coef", self.sum_penalty_coef)
        if not isinstance(self.init, str) or (
            self.init != "uniform" and not self.init.startswith(ANCHOR)
        ):
            raise ValueError(f"init must be 'uniform' or 'anchor:ADAPTER', got {self.init!r}")
        if self.adapters:
            self.start()
        if self.bias_inside and self.init != "uniform":
            raise ValueError(
                "a bias inside the softmax cannot start at one adapter alone; use init='uniform'"
            )

    def start(self) -> list[float]:
        """c: the weights before training."""
        names = self.names
        if self.init == "uniform":
            return [1 / len(names)] * len(names)
        anchor = self.init.removeprefix(ANCHOR)
        if anchor not in names:
            raise ValueError(f"init names the adapter {anchor!r}; there are {list(names)}")
        return [float(name == anchor) for name in names]


class FlowGate(Router):
    """softmax(W x / T) + b: one weight per adapter, sites beneath share them."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "layer"
    when = "token"

    def __init__(self, config: LoRAFlowConfig, width: int):
        super().__init__()
        self.names = config.names
        self.temperature, self.bias_inside = config.temperature, config.bias_inside
        num = len(self.names)
        self.weight = None if config.static else nn.Parameter(torch.zeros(num, width))
        self.bias = nn.Parameter(torch.tensor(config.start()) - 1 / num)

    def forward(self, view: RouteView, incoming: Route) -> Route:
        logits_NE = self._logits(view.x_ND)
        bias_E = self.bias.to(logits_NE.dtype)
        if self.bias_inside:
            logits_NE = logits_NE + bias_E
        p_NE = logits_NE.softmax(-1)
        kept_NE, kept_E = p_NE, bias_E
        if view.mask_E is not None:
            kept_NE = logits_NE.masked_fill(~view.mask_E, float("-inf")).softmax(-1)
            kept_E = bias_E.masked_fill(~view.mask_E, 0.0)
        weight_NE = kept_NE if self.bias_inside else kept_NE + kept_E
        view.record(
            columns=self.names, weight=weight_NE, probs=p_NE, logits=logits_NE, valid=view.valid_N
        )
        return Route(weight=weight_NE)

    def _logits(self, x_ND: Tensor) -> Tensor:
        wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        if self.weight is None:
            return torch.zeros(x_ND.shape[0], len(self.names), dtype=wide, device=x_ND.device)
        return x_ND.to(wide) @ self.weight.to(wide).T / self.temperature


class SiteGate(FlowGate):
    """The same of a single linear, whose own input it reads."""

    scope = "site"


class LoRAFlowMethod(Method):
    name = "loraflow"
    title = "LoRA-Flow"
    paper = "arXiv 2402.11455"
    granularity = "expert (frozen LoRAs)"
    routing_unit = "token"
    servability: Servability = "per_token"
    config_class = LoRAFlowConfig
    default_learning_rate = 1e-3
    needs_adapters = True
    trains_rows = False
    config: LoRAFlowConfig

    def __init__(self, config: LoRAFlowConfig):
        super().__init__(config)
        self._first: str | None = None

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        config = self.config
        if config.granularity == "module":
            return {site.path: SiteGate(config, site.d_in) for site in sites}
        found: dict[str, Router] = {}
        for site in sites:
            if site.layer_path in found:
                continue
            if config.granularity == "step" and found:
                break
            found[site.layer_path] = FlowGate(config, site.d_model)
        if config.granularity == "step":
            self._first = next(iter(found))
        return found

    def governor_of(self, site: Site) -> str | None:
        return self._first

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        if not records or self.config.sum_penalty_coef == 0:
            return {}
        return {"sum": self.config.sum_penalty_coef * sum_penalty(records)}


def sum_penalty(records: Sequence[RouteRecord]) -> Tensor:
    """(sum_i w_i - 1)^2, mean over real tokens, then over gates."""
    terms = []
    for record in records:
        assert record.valid is not None
        over_N1 = (record.gates.sum(-1, keepdim=True) - 1).square()
        terms.append(mean_over(over_N1, record.valid)[0])
    return torch.stack(terms).mean()


METHOD = LoRAFlowMethod
