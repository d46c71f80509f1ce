"""MixLoRA: N LoRA experts inside every FFN behind a token router, one plain LoRA per attention linear.

Li et al., MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts, arXiv 2404.15159.
For an FFN input x, router weight G [N, d] and the frozen W1, W3, W2 shared by all experts:

    p = softmax(G x)  in fp32 ;  w, idx = top-k of p, renormalised
    u_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x)
    y   = sum_k w_k (W2 u_k + s B2_k A2_k u_k)  =  W2 (sum_k w_k u_k) + sum_k w_k s B2_k A2_k u_k

The last step is exact and not in the paper: the base down projection runs once per token. With DoRA experts
(MixDoRA) the base projection of the exit runs per row, since each expert rescales it.

Letters: N tokens, D width of the FFN input, E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.method import Method, MethodConfig
from loramux.core.router import Router, RouteView, mean_over, switch_balance, top_k_stable
from loramux.core.types import Expert, Route, RouteRecord, Site
from loramux.core.values import (
    check_not_negative,
    check_positive,
    check_share,
    check_whole,
    is_number,
)
from loramux.ops.gates import TopKGate

Strategy = Literal["mixlora", "mixlora-dynamic", "mixlora-switch"]


@dataclass(frozen=True, kw_only=True)
class MixLoRAConfig(MethodConfig):
    """Defaults are the paper's (r 16, alpha 32, dropout 0.05, 8 experts, top-2), the loss coefficient the code's.

    routing_strategy: "mixlora" top-k, renormalised; "mixlora-dynamic" the fewest experts whose probability reaches
    top_p; "mixlora-switch" one expert within a capacity. Fields that only one of them reads are ignored by the others.
    aux_form: "balanced" is 1 when balanced, whatever k (ours, per layer, mean over layers); "code" is the released
    code's (all layers pooled; balanced it is k, for the switch 1, for dynamic the mean number of experts chosen). The
    coefficient None is the released 1e-3, times top_k for "balanced" with "mixlora", which then weighs the same.
    """

    method = "mixlora"

    r: int = 16
    lora_dropout: float = 0.05
    num_experts: int = 8
    top_k: int = 2
    routing_strategy: Strategy = "mixlora"
    router_aux_loss_coef: float | None = None
    aux_form: Literal["balanced", "code"] = "balanced"
    router_init_range: float | None = None
    jitter_noise: float | None = None
    top_p: float = 0.8
    temperature: float = 0.0
    renormalise_top_p: bool = False
    expert_capacity: int = 32
    router_z_loss_coef: float = 1e-3
    sparse_step: int = 1
    published_parity: bool = False
    expert_r: int | None = None
    expert_alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("top_k", self.top_k)  # before a default is computed from it
        switch = self.routing_strategy == "mixlora-switch"
        defaults = {
            "router_aux_loss_coef": 1e-3 * self.code_form_scale,
            "router_init_range": 1.0 if switch else 0.02,
            "jitter_noise": 0.01 if switch else 0.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("num_experts", "sparse_step", "expert_capacity"):
            check_whole(name, getattr(self, name))
        if self.expert_r is not None:
            check_whole("expert_r", self.expert_r)
        if self.expert_alpha is not None:
            check_positive("expert_alpha", self.expert_alpha)
        coefficients = ("router_aux_loss_coef", "router_z_loss_coef")
        for name in (*coefficients, "router_init_range", "temperature"):
            check_not_negative(name, getattr(self, name))
        check_share("jitter_noise", self.jitter_noise)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be in 1..num_experts ({self.num_experts}), got {self.top_k}"
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")

    def default_alpha(self) -> float:
        return 32.0

    @property
    def code_form_scale(self) -> int:
        """What the released balance loss is, relative to this config's form, when balanced.

        For dynamic that is the number of experts chosen, known only after routing: 1 stands in for it.
        """
        return (
            self.top_k if (self.aux_form, self.routing_strategy) == ("balanced", "mixlora") else 1
        )

    @property
    def normalised(self) -> bool:
        """Whether the weights of a token always sum to 1."""
        if self.routing_strategy == "mixlora-dynamic":
            return self.renormalise_top_p
        return self.routing_strategy == "mixlora" or not self.published_parity


class TokenRouter(Router):
    """One per FFN: every token becomes K rows, one per chosen expert."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "block"
    when = "token"

    def __init__(self, config: MixLoRAConfig, d_model: int):
        super().__init__()
        self.config = config
        assert config.router_init_range is not None
        self.weight = nn.Parameter(
            torch.randn(config.num_experts, d_model) * config.router_init_range
        )
        self.names = tuple(str(e) for e in range(config.num_experts))

    def forward(self, view: RouteView, incoming: Route) -> Route:
        x_ND = view.x_ND
        wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        x_ND = x_ND.to(wide)
        if view.training and self.config.jitter_noise:
            noise = self.config.jitter_noise
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - noise, 1 + noise)
        logits_NE = x_ND @ self.weight.to(wide).T
        slot_NK, weight_NK, p_NE = self._choose(logits_NE, view)
        view.record(
            columns=self.names,
            weight=weight_NK,
            slot=slot_NK,
            probs=p_NE,
            logits=logits_NE,
            valid=view.valid_N,
        )
        return Route(
            slot=slot_NK, weight=weight_NK, combine="rows", sums_to_one=self.config.normalised
        )

    def _choose(self, logits_NE: Tensor, view: RouteView) -> tuple[Tensor, Tensor, Tensor]:
        """(slot [N, K], weight [N, K], probabilities [N, E])."""
        config = self.config
        if config.routing_strategy == "mixlora-dynamic":
            return self._dynamic(logits_NE)
        p_NE = logits_NE.softmax(-1)
        if config.routing_strategy == "mixlora-switch":
            return (*self._switch(p_NE, view), p_NE)
        slot_NK = top_k_stable(p_NE, config.top_k)
        weight_NK = p_NE.gather(1, slot_NK)
        return slot_NK, weight_NK / weight_NK.sum(-1, keepdim=True), p_NE

    def lowered(self) -> TopKGate | None:
        """None for the dynamic strategy, whose number of experts differs by token."""
        config = self.config
        if config.routing_strategy == "mixlora-dynamic":
            return None
        if config.routing_strategy == "mixlora-switch":
            return TopKGate(self.weight, 1, normalise=not config.published_parity)
        return TopKGate(self.weight, config.top_k, normalise=True)

    def _dynamic(self, logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts in order of probability while the sum stays within top_p, and the first that crosses it."""
        config = self.config
        if config.temperature > 0 and not config.published_parity:
            logits_NE = logits_NE / config.temperature
        p_NE = logits_NE.softmax(-1)
        if config.temperature > 0 and config.published_parity:
            p_NE = p_NE / config.temperature
        order_NE = top_k_stable(p_NE, p_NE.shape[1])
        sorted_NE = p_NE.gather(1, order_NE)
        within_NE = sorted_NE.cumsum(-1) <= config.top_p
        keep_NE = torch.cat([torch.ones_like(within_NE[:, :1]), within_NE[:, :-1]], dim=1)
        k = int(keep_NE.sum(1).max())
        keep_NK = keep_NE[:, :k]
        weight_NK = sorted_NE[:, :k].masked_fill(~keep_NK, 0.0)
        if config.renormalise_top_p:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        return order_NE[:, :k].masked_fill(~keep_NK, -1), weight_NK, p_NE

    def _switch(self, p_NE: Tensor, view: RouteView) -> tuple[Tensor, Tensor]:
        """Top-1. In training each expert takes `expert_capacity` tokens of a request; the others run the bare FFN."""
        slot_N1 = top_k_stable(p_NE, 1)
        chosen_N1 = p_NE.gather(1, slot_N1)
        if self.config.published_parity:
            weight_N1 = chosen_N1
        else:
            weight_N1 = 1 + (chosen_N1 - chosen_N1.detach())  # 1 going forward, p going back
        if view.training:
            full_N1 = self._overflow(slot_N1, view)
            slot_N1 = slot_N1.masked_fill(full_N1, -1)
            bypass = 0.0 if self.config.published_parity else 1.0
            weight_N1 = weight_N1.masked_fill(full_N1, bypass)
        return slot_N1, weight_N1

    def _overflow(self, slot_N1: Tensor, view: RouteView) -> Tensor:
        """True for tokens that come after their expert is full within their own request: no neighbour counts."""
        num = self.config.num_experts
        # Padding goes to a bucket of its own: it fills no expert.
        pick_N = (view.request_N * (num + 1) + slot_N1[:, 0]).masked_fill(~view.valid_N, -1)
        order_N = torch.sort(pick_N, stable=True).indices
        sorted_N = pick_N[order_N]
        place_N = torch.arange(pick_N.shape[0], device=pick_N.device)
        start_N = torch.searchsorted(sorted_N, sorted_N)
        rank_N = torch.empty_like(place_N).scatter(0, order_N, place_N - start_N)
        return (rank_N >= self.config.expert_capacity).unsqueeze(1)


class MixLoRAMethod(Method):
    name = "mixlora"
    title = "MixLoRA"
    paper = "arXiv 2404.15159"
    granularity = "expert in the FFN"
    routing_unit = "token"
    servability = "per_token"
    config_class = MixLoRAConfig
    default_learning_rate = 2e-4
    config: MixLoRAConfig

    def _is_sparse(self, site: Site) -> bool:
        return site.kind == "ffn" and site.layer % self.config.sparse_step == 0

    def experts(self, site: Site) -> list[Expert]:
        config = self.config
        rank, scale = config.rank_at(site.path), config.scale_at(site.path)
        if not self._is_sparse(site):
            return [Expert(rank, scale)]
        if config.expert_r is not None or config.expert_alpha is not None:
            rank = config.expert_r if config.expert_r is not None else rank
            alpha = config.expert_alpha if config.expert_alpha is not None else config.lora_alpha
            assert alpha is not None
            scale = float(alpha / rank**0.5 if config.use_rslora else alpha / rank)
        return [Expert(rank, scale)] * config.num_experts

    def check_sites(self, sites: Sequence[Site]) -> None:
        if not any(site.kind == "ffn" for site in sites):
            raise ValueError(
                "MixLoRA puts its experts into the FFN; target at least one FFN linear"
            )
        if not any(self._is_sparse(site) for site in sites):
            step = self.config.sparse_step
            layers = sorted({site.layer for site in sites if site.kind == "ffn"})
            raise ValueError(
                f"no targeted FFN is in a layer that holds experts: sparse_step={step} allows layers 0, {step}, "
                f"{2 * step}, ..., the targeted ones are {layers}; lower sparse_step or widen layers_to_transform"
            )

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        found: dict[str, Router] = {}
        for site in sites:
            if self._is_sparse(site) and site.block not in found:
                found[site.block] = TokenRouter(self.config, site.d_model)
        return found

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        config = self.config
        if not records:
            return {}
        losses = {}
        if config.router_aux_loss_coef:
            losses["balance"] = config.router_aux_loss_coef * balance_loss(records, config)
        if config.routing_strategy == "mixlora-switch" and config.router_z_loss_coef:
            losses["z"] = config.router_z_loss_coef * z_loss(records)
        return losses


def balance_loss(records: Sequence[RouteRecord], config: MixLoRAConfig) -> Tensor:
    """Load balance over all layers; see `aux_form`."""
    if config.aux_form == "code":
        probs = torch.cat([_probs(r) for r in records])
        gates = torch.cat([r.gates for r in records])
        valid = torch.cat([_valid(r) for r in records])
        if config.routing_strategy == "mixlora-switch":
            return switch_balance(probs, torch.ones_like(valid))
        if config.routing_strategy == "mixlora-dynamic":
            valid = torch.ones_like(valid)  # the released code masks no padding here
        return selected_balance(gates, probs, valid)
    terms = []
    for record in records:
        probs, valid = _probs(record), _valid(record)
        if config.routing_strategy == "mixlora-switch":
            terms.append(switch_balance(probs, valid))
            continue
        value = selected_balance(record.gates, probs, valid)
        chosen = mean_over((record.gates.detach() > 0).to(probs.dtype), valid).sum()
        terms.append(value / chosen.clamp_min(1))
    return torch.stack(terms).mean()


def selected_balance(gates_NE: Tensor, probs_NE: Tensor, valid_N: Tensor) -> Tensor:
    """E * sum_i f_i P_i with f_i the mean number of selections of expert i per token; K when balanced."""
    share_E = mean_over((gates_NE.detach() > 0).to(probs_NE.dtype), valid_N)
    return probs_NE.shape[1] * (share_E * mean_over(probs_NE, valid_N)).sum()


def z_loss(records: Sequence[RouteRecord]) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits)^2: keeps the router's logits small."""
    terms = []
    for record in records:
        assert record.logits is not None
        square = record.logits.logsumexp(-1).square().unsqueeze(-1)
        terms.append(mean_over(square, _valid(record))[0])
    return torch.stack(terms).mean()


def _probs(record: RouteRecord) -> Tensor:
    assert record.probs is not None
    return record.probs


def _valid(record: RouteRecord) -> Tensor:
    assert record.valid is not None
    return record.valid


METHOD = MixLoRAMethod
