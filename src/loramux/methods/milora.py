"""MiLoRA: every LoRA module of a layer is an expert; each prompt picks its modules once, all its tokens use them.

Zhang et al., MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning, Findings of
EMNLP 2024, arXiv 2410.18035. Not the initialisation scheme of arXiv 2406.09044.

For layer l and one prompt with hidden states H before the layer's norm:

    u = H w_sa ;  h = softmax(u over the prompt)^T H          self-attention pooler (Eq. 8)
    p = softmax( Ra(h) W_r )                                  one probability per module of the layer (Eq. 3)
    g = 1 for the k most probable modules, else 0
    y = W_m x + g_m s B_m^T A_m x                             for every token of the sample

Ra is a learned rational function, degrees 6 and 5 (Eq. 6). The gradient reaches the router straight through:
g = hard * (1 + p - stop(p)); that form is ours, the paper does not say how its hard gates are trained.

Letters: N tokens, Q requests, D hidden width, C modules of a layer, k chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.method import Method, MethodConfig
from loramux.core.router import (
    Router,
    RouteView,
    segment_softmax,
    segment_sum,
    switch_balance,
    top_k_stable,
)
from loramux.core.types import Route, RouteRecord, Site
from loramux.core.values import check_not_negative, check_whole

# Least squares fit of GELU on [-3, 3], largest error 1.2e-4 (ours; the paper says only that it starts near GELU).
GELU_NUMERATOR = (2.812e-05, 0.5, 0.39850089, 0.16236861, 0.06410833, 0.01833195, 0.00210176)
GELU_DENOMINATOR = (0.0, 0.32473722, 0.0, 0.03666389, 0.0)


@dataclass(frozen=True, kw_only=True)
class MiLoRAConfig(MethodConfig):
    """r, top_k and router_aux_loss_coef are the paper's; lora_alpha = r (scale 1) is ours, the paper names none.

    gate: "ste" keeps the forward gate exactly 1; "prob" multiplies by p; "renorm" by p k / sum of the chosen p.
    router_norm: "rms" (ours) normalises the pooled vector, without parameters, so that the softmax does not saturate
    on the large activations of the residual stream; "none" is the literal reading.
    """

    method = "milora"

    r: int = 32
    top_k: int = 3
    router_aux_loss_coef: float = 1e-2
    gate: Literal["ste", "prob", "renorm"] = "ste"
    pooler: Literal["attention", "mean", "last", "max"] = "attention"
    activation: Literal["rational", "gelu", "relu"] = "rational"
    router_norm: Literal["rms", "none"] = "rms"
    router_init_range: float = 0.02
    aux_reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("top_k", self.top_k)
        check_not_negative("router_aux_loss_coef", self.router_aux_loss_coef)
        check_not_negative("router_init_range", self.router_init_range)

    def default_alpha(self) -> float:
        return float(self.r)


class Rational(nn.Module):
    """Ra(x) = sum a_j x^j / (1 + |sum b_i x^i|), elementwise; starts as GELU. Computed in fp32 or wider."""

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(GELU_NUMERATOR))
        self.denominator = nn.Parameter(torch.tensor(GELU_DENOMINATOR))

    def forward(self, x: Tensor) -> Tensor:
        # Horner's scheme: x^6 of a large activation overflows half precision, hence the wide dtype of the caller.
        top = torch.zeros_like(x)
        for a in self.numerator.flip(0):
            top = top * x + a
        bottom = torch.zeros_like(x)
        for b in self.denominator.flip(0):
            bottom = (bottom + b) * x
        return top / (1 + bottom.abs())


class PromptRouter(Router):
    """One per layer: pools the prompt's hidden states, picks the modules of the layer."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "layer"
    when = "prompt"

    def __init__(self, config: MiLoRAConfig, sites: Sequence[Site], d_model: int):
        super().__init__()
        self.config = config
        self.column = {site.path: i for i, site in enumerate(sites)}
        self.names = tuple(site.name for site in sites)
        # w_sa; zero: starts as the masked mean. The other poolers have no parameters.
        self.query = nn.Parameter(torch.zeros(d_model)) if config.pooler == "attention" else None
        self.weight = nn.Parameter(torch.randn(d_model, len(sites)) * config.router_init_range)
        self.activation = Rational() if config.activation == "rational" else None

    def forward(self, view: RouteView, incoming: Route) -> Route:
        wide = torch.float64 if view.x_ND.dtype == torch.float64 else torch.float32
        h_QD = self._pool(view, wide)
        if self.config.router_norm == "rms":
            h_QD = h_QD * torch.rsqrt(h_QD.square().mean(-1, keepdim=True) + 1e-6)
        logits_QC = self._activate(h_QD) @ self.weight.to(wide)
        p_QC = logits_QC.softmax(-1)
        gate_QC = self._gate(p_QC)
        owned_Q = torch.zeros(view.num_requests, dtype=torch.bool, device=p_QC.device)
        owned_Q[view.request_N[view.prompt_N]] = True
        view.record(columns=self.names, weight=gate_QC, probs=p_QC, logits=logits_QC, valid=owned_Q)
        return Route(gate=gate_QC, column=self.column)

    def _pool(self, view: RouteView, dtype: torch.dtype) -> Tensor:
        kind = self.config.pooler
        x_ND, prompt_N, request_N = view.x_ND.to(dtype), view.prompt_N, view.request_N
        if kind == "max":
            index = request_N.unsqueeze(1).expand_as(x_ND)
            low = x_ND.new_full((view.num_requests, x_ND.shape[1]), float("-inf"))
            masked = x_ND.masked_fill(~prompt_N.unsqueeze(1), float("-inf"))
            top = low.scatter_reduce(0, index, masked, "amax")
            return top.masked_fill(top == float("-inf"), 0.0)
        if kind == "last":
            place_N = torch.arange(x_ND.shape[0], device=x_ND.device)
            last_Q = torch.zeros(view.num_requests, dtype=torch.long, device=x_ND.device)
            last_Q = last_Q.scatter_reduce(0, request_N[prompt_N], place_N[prompt_N], "amax")
            return x_ND[last_Q]
        query = self.query
        score_N = x_ND.new_zeros(len(x_ND)) if query is None else x_ND @ query.to(dtype)
        share_N = segment_softmax(score_N, request_N, prompt_N, view.num_requests)
        return segment_sum(share_N.unsqueeze(1) * x_ND, request_N, view.num_requests)

    def _activate(self, h_QD: Tensor) -> Tensor:
        if self.activation is not None:
            return self.activation(h_QD)  # type: ignore[no-any-return]
        act = nn.functional.gelu if self.config.activation == "gelu" else nn.functional.relu
        return act(h_QD)

    def _gate(self, p_QC: Tensor) -> Tensor:
        k = min(self.config.top_k, p_QC.shape[1])
        hard_QC = torch.zeros_like(p_QC).scatter(1, top_k_stable(p_QC.detach(), k), 1.0)
        if self.config.gate == "ste":
            return hard_QC * (1 + (p_QC - p_QC.detach()))
        kept_QC = hard_QC * p_QC
        if self.config.gate == "prob":
            return kept_QC
        return kept_QC * k / kept_QC.sum(-1, keepdim=True)


class MiLoRAMethod(Method):
    name = "milora"
    title = "MiLoRA"
    paper = "arXiv 2410.18035"
    granularity = "module"
    routing_unit = "prompt"
    servability = "per_request"
    config_class = MiLoRAConfig
    default_learning_rate = 1e-4
    config: MiLoRAConfig

    def check_sites(self, sites: Sequence[Site]) -> None:
        for layer, own in _by_layer(sites).items():
            if len(own) < self.config.top_k:
                raise ValueError(
                    f"{layer} has {len(own)} targeted linears, fewer than top_k={self.config.top_k}; "
                    "lower top_k or target more modules"
                )

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        return {
            layer: PromptRouter(self.config, own, own[0].d_model)
            for layer, own in _by_layer(sites).items()
        }

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        """lambda * L_lb per layer (Eq. 4-5), summed over layers as the Switch Transformer sums its sparse layers."""
        if not records or self.config.router_aux_loss_coef == 0:
            return {}
        terms = []
        for record in records:
            assert record.probs is not None and record.valid is not None
            terms.append(switch_balance(record.probs, record.valid))
        total = torch.stack(terms)
        value = total.sum() if self.config.aux_reduction == "sum" else total.mean()
        return {"balance": self.config.router_aux_loss_coef * value}


def _by_layer(sites: Sequence[Site]) -> dict[str, list[Site]]:
    layers: dict[str, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer_path, []).append(site)
    return layers


METHOD = MiLoRAMethod
