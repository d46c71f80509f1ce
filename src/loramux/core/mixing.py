"""Ready parts for mixtures with a gate at every linear: the gate, the config and method around it, balance losses.

Why here: MoLA, LoRAMoE, HydraLoRA and MoLoRA differ in which linears they target, how many experts a linear has,
whether these share A, and which loss spreads the load. The forward is one:

    p = softmax(G x)                     in fp32, G [E, I], x the linear's own input
    w = p, or its k largest, renormalised
    y = W0 x + s sum_i w_i B_i^T A_i x

Letters: N tokens, Q requests, E experts of a linear, K chosen, I input width of the linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.method import Method, MethodConfig
from loramux.core.router import Router, RouteView, mean_over, segment_sum, top_k_stable
from loramux.core.types import Expert, Route, Site
from loramux.core.values import check_not_negative, check_whole
from loramux.ops.gates import TopKGate

SPREAD_FLOOR = 1e-10  # under the squared mean of the coefficient of variation
Orientation = Literal["code", "specialise"]


@dataclass(frozen=True, kw_only=True)
class GateConfig(MethodConfig):
    """router_init_range: standard deviation of the gates' start; None: uniform in +-1/sqrt(width), as nn.Linear."""

    router_init_range: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_init_range is not None:
            check_not_negative("router_init_range", self.router_init_range)
        refuse_dora(self)


@dataclass(frozen=True, kw_only=True)
class DenseConfig(GateConfig):
    """num_experts at every targeted linear, all of them weighed.

    top_k_at_inference: an approximation outside training, keep the k largest weights, renormalised; None: exact.
    """

    num_experts: int = 8
    top_k_at_inference: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_experts", self.num_experts)
        if self.top_k_at_inference is not None:
            check_whole("top_k_at_inference", self.top_k_at_inference)


def refuse_dora(config: MethodConfig) -> None:
    """The papers weigh low-rank increments; a DoRA expert is none."""
    if config.use_dora:
        raise ValueError(
            f"{config.method} weighs increments B A x, which a DoRA expert has none of; leave use_dora off "
            "(midora and mixdora are mixtures of DoRA experts)"
        )


class LinearGate(Router):
    """One per linear: reads the linear's own input and weighs all its experts, exact zeros where not chosen."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    when = "token"

    def __init__(
        self,
        num_experts: int,
        d_in: int,
        *,
        top_k: int | None = None,
        top_k_at_inference: int | None = None,
        init_range: float | None = None,
    ):
        super().__init__()
        self.names = tuple(str(e) for e in range(num_experts))
        self.k = num_experts if top_k is None else min(top_k, num_experts)
        self.k_at_inference = (
            self.k if top_k_at_inference is None else min(top_k_at_inference, self.k)
        )
        self.weight = nn.Parameter(gate_start(num_experts, d_in, init_range))

    def forward(self, view: RouteView, incoming: Route) -> Route:
        x_NI = view.x_ND
        wide = torch.float64 if x_NI.dtype == torch.float64 else torch.float32
        logits_NE = x_NI.to(wide) @ self.weight.to(wide).T
        p_NE = logits_NE.softmax(-1)
        k = self.k if view.training else self.k_at_inference
        weight_NE, slot_NK, weight_NK = kept(p_NE, k)
        view.record(
            columns=self.names,
            weight=weight_NK,
            slot=slot_NK,
            probs=p_NE,
            logits=logits_NE,
            valid=view.valid_N,
            request=view.request_N,
            tasks=view.tasks,
        )
        return Route(weight=weight_NE)

    def lowered(self) -> TopKGate:
        """Softmax over all experts is the case k = E."""
        return TopKGate(self.weight, self.k_at_inference, normalise=True)


def gate_start(num_experts: int, d_in: int, init_range: float | None) -> Tensor:
    """[E, I]: normal with this standard deviation, or what nn.Linear starts with."""
    if init_range is not None:
        return torch.randn(num_experts, d_in) * init_range
    bound = 1 / math.sqrt(d_in)
    return torch.empty(num_experts, d_in).uniform_(-bound, bound)


def kept(p_NE: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dense weights [N, E], slots [N, K], their weights [N, K]): the k largest, renormalised.

    With k = E nothing is chosen: no slots, and the weights are p itself.
    """
    if k >= p_NE.shape[1]:
        return p_NE, None, p_NE
    slot_NK = top_k_stable(p_NE.detach(), k)
    weight_NK = p_NE.gather(1, slot_NK)
    weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
    return torch.zeros_like(p_NE).scatter(1, slot_NK, weight_NK), slot_NK, weight_NK


class GatedMethod(Method):
    """A gate at every targeted linear. Subclasses say how many experts it has and which loss there is."""

    granularity = "expert at a linear"
    routing_unit = "token"
    servability = "per_token"
    config: GateConfig

    def num_experts_at(self, site: Site) -> int:
        assert isinstance(self.config, DenseConfig)
        return self.config.num_experts

    def gate_at(self, site: Site) -> LinearGate:
        assert isinstance(self.config, DenseConfig)
        return LinearGate(
            self.num_experts_at(site),
            site.d_in,
            top_k_at_inference=self.config.top_k_at_inference,
            init_range=self.config.router_init_range,
        )

    def experts(self, site: Site) -> list[Expert]:
        config = self.config
        one = Expert(config.rank_at(site.path), config.scale_at(site.path))
        return [one] * self.num_experts_at(site)

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        return {site.path: self.gate_at(site) for site in sites}


# --- Losses ---------------------------------------------------------------------------------------


def selection_balance(gates_NE: Tensor, probs_NE: Tensor, valid_N: Tensor) -> Tensor:
    """E * sum_i f_i P_i, f_i the share of all selections that fell on expert i; 1 when balanced, whatever k."""
    picked_NE = (gates_NE.detach() > 0).to(probs_NE.dtype)
    share_E = mean_over(picked_NE, valid_N)
    share_E = share_E / share_E.sum().clamp_min(torch.finfo(share_E.dtype).tiny)
    return probs_NE.shape[1] * (share_E * mean_over(probs_NE, valid_N)).sum()


def importance(gates_NE: Tensor, request_N: Tensor, valid_N: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of each request's gates over its real tokens [Q, E], the requests themselves [Q])."""
    own_Q, index_n = torch.unique(request_N[valid_N], return_inverse=True)
    return segment_sum(gates_NE[valid_N], index_n, own_Q.shape[0]), own_Q


def spread(value_QE: Tensor) -> Tensor:
    """var / (mean^2 + 1e-10) over all entries, the unbiased variance: the squared coefficient of variation."""
    if value_QE.numel() < 2:
        return value_QE.sum() * 0
    return value_QE.var() / (value_QE.mean().square() + SPREAD_FLOOR)


def localised_weights(
    type_Q: Tensor, num_experts: int, delta: float, orientation: Orientation
) -> Tensor:
    """I [Q, E] of LoRAMoE's constraint: 1 + delta on one half of the experts, 1 - delta on the other.

    A request of type 1 owns the first half, one of type 0 the second; a negative type owns none: 1 everywhere.
    "code": 1 + delta on the own half; "specialise": 1 - delta there, which is what makes the own share grow.
    """
    first_E = torch.arange(num_experts, device=type_Q.device) < num_experts // 2
    own_QE = first_E.unsqueeze(0) == (type_Q == 1).unsqueeze(1)
    sign = delta if orientation == "code" else -delta
    weight_QE = torch.where(own_QE, 1 + sign, 1 - sign)
    return torch.where((type_Q < 0).unsqueeze(1), torch.ones_like(weight_QE), weight_QE)
