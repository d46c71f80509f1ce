"""MoLE: learned gates over frozen trained LoRAs, one gate per unit of the model; only the gates are trained.

Wu, Huang, Wei, Mixture of LoRA Experts, ICLR 2024, arXiv 2404.13628. Several other papers share the name.
For a unit with experts E_i(x) = s_i B_i^T A_i x (the increments, not whole block outputs):

    z   = LayerNorm( concat_i E_i(x) )         no affine, over all N d_o entries
    eps = z @ e        e [N d_o, N], starts at zero
    G   = softmax(eps / tau)                   tau = exp(log_tau), starts at 1
    y   = W0 x + sum_i G_i E_i(x)

Units with several linears compute G at their first one and reuse it: "additive" execution, the increments added up
linear by linear. Gates over whole-block outputs, every expert running its own attention, would need a KV cache per
expert; so would the paper's variant for images, which is not here.

The N d_o vector is never built: with t = A x, concat @ e = sum_i t_i (s_i B_i e_i), and mean and variance are a
linear and a quadratic form in t.

Letters: N tokens, Q requests, R rank rows of the site, O output width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.bank import Rows
from loramux.core.frozen import FrozenConfig
from loramux.core.method import Method
from loramux.core.router import Router, RouteView, mean_over, segment_softmax, segment_sum
from loramux.core.types import Route, RouteRecord, Servability, Site, When
from loramux.core.values import check_not_negative
from loramux.ops import gates

NORM_EPS = 1e-5
BALANCE_FLOOR = 1e-8


@dataclass(frozen=True, kw_only=True)
class MoLEConfig(FrozenConfig):
    """granularity: "matrix" a gate per linear; "layer" per attention and per FFN of a layer; "block" per decoder layer;
    "network" one gate. execution: how a unit of several linears is mixed; see the module's docstring.

    pool: "token" a weight vector per token (ours: causal, works with a KV cache); "prompt_mean" one per request from
    its prompt, fixed afterwards; "mean" the paper's nearest: the same in generation, but in training and scoring the
    mean runs over the answer too. router_aux_loss_coef is the paper's alpha.
    masked_input: what a gate reads of experts that `mask_experts` leaves out: "exact" their increments, "fast" zeros.
    weight_sum: "N" multiplies the weights by their number, so that every expert may act in full; not the paper's.
    """

    method = "mole"

    granularity: Literal["matrix", "layer", "block", "network"] = "layer"
    execution: Literal["additive"] = "additive"
    pool: Literal["token", "mean", "prompt_mean"] = "token"
    router_aux_loss_coef: float = 0.5
    share_tau: bool = False
    masked_input: Literal["exact", "fast"] = "exact"
    weight_sum: Literal["1", "N"] = "1"

    def __post_init__(self) -> None:
        if str(self.execution) == "parallel":
            raise ValueError(
                "execution='parallel' gates whole-block outputs, so every expert would run its own attention with a KV "
                "cache of its own; it is not provided, use execution='additive'"
            )
        if str(self.pool) == "flatten":
            raise ValueError(
                "pool='flatten' has parameters for one fixed sequence length, which text does not have; use 'token', "
                "'prompt_mean' or 'mean'"
            )
        super().__post_init__()
        check_not_negative("router_aux_loss_coef", self.router_aux_loss_coef)
        if self.lora_dropout:
            raise ValueError(
                "MoLE trains gates over frozen adapters, which run as they were trained: lora_dropout does not apply"
            )


class LateGate(Router):
    """Reads t = A x of the unit's first linear and weighs the experts."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    reads: ClassVar[Literal["x", "t"]] = "t"

    def __init__(self, config: MoLEConfig, d_out: int):
        super().__init__()
        self.names = config.names
        self.when: When = "token" if config.pool == "token" else "prompt"
        self.pools_answers = config.pool == "mean"
        self.skips_masked = config.masked_input == "fast"
        num_experts = self.num_experts = len(self.names)
        self.factor = num_experts if config.weight_sum == "N" else 1
        self.weight = nn.Parameter(torch.zeros(num_experts, d_out, num_experts))  # e, by expert
        self.log_tau = nn.Parameter(torch.zeros(()))
        self._gram: tuple[object, Tensor, Tensor] | None = None
        self._rows: list[Rows] = []  # in a list, so that they are not registered a second time

    def bind(self, rows: Rows) -> None:
        """Tell the gate which rows it reads; they are frozen, so their Gram matrices are computed once."""
        if rows.magnitude is not None:
            raise ValueError(
                "MoLE over DoRA adapters is not defined: their change is not a sum of ranks"
            )
        self._rows = [rows]

    def forward(self, view: RouteView, incoming: Route) -> Route:
        wide = torch.float64 if view.x_ND.dtype == torch.float64 else torch.float32
        t_NR = view.x_ND.to(wide)
        if view.mask_E is not None and self.skips_masked:
            slot_R = self._rows[0].spans.row_slot_R.to(t_NR.device)
            t_NR = t_NR * view.mask_E[slot_R]
        eps_NE = self._logits(t_NR)
        if self.when == "prompt":
            pooled_N = view.valid_N if self.pools_answers else view.prompt_N
            ones_N = torch.zeros_like(eps_NE[:, 0])
            share_N = segment_softmax(ones_N, view.request_N, pooled_N, view.num_requests)
            eps_NE = segment_sum(share_N.unsqueeze(1) * eps_NE, view.request_N, view.num_requests)
        scaled_NE = eps_NE / self.log_tau.to(wide).exp()
        p_NE = scaled_NE.softmax(-1)
        if view.mask_E is not None:
            scaled_NE = scaled_NE.masked_fill(~view.mask_E, float("-inf"))
        gate_NE = scaled_NE.softmax(-1)
        valid = view.valid_N
        if self.when == "prompt":
            valid = torch.zeros(view.num_requests, dtype=torch.bool, device=eps_NE.device)
            valid[view.request_N[view.prompt_N]] = True
        view.record(columns=self.names, weight=gate_NE, probs=p_NE, logits=eps_NE, valid=valid)
        weight_NE = gate_NE if self.factor == 1 else self.factor * gate_NE
        return Route(weight=weight_NE, per_request=self.when == "prompt")

    def _logits(self, t_NR: Tensor) -> Tensor:
        """LayerNorm(concat of increments) @ e from t alone. Variance in wide precision, clamped at 0."""
        rows = self._rows[0]
        spans = rows.spans
        slot_R = spans.row_slot_R.to(t_NR.device)
        b_RO, mean_R, gram_RR = self._frozen(rows, t_NR)
        e_EOE = self.weight.to(t_NR.dtype)
        num = e_EOE.shape[0] * e_EOE.shape[1]
        # s_i B_i e_i for every rank row: [R, E]
        be_RE = torch.einsum("ro,roe->re", b_RO, e_EOE[slot_R])
        mean_N1 = (t_NR @ mean_R).unsqueeze(1)
        square_N = ((t_NR @ gram_RR) * t_NR).sum(1) / num
        var_N1 = (square_N.unsqueeze(1) - mean_N1.square()).clamp_min(0)
        total_E = e_EOE.sum(dim=(0, 1))
        return (t_NR @ be_RE - mean_N1 * total_E) * torch.rsqrt(var_N1 + NORM_EPS)

    def lowered(self) -> gates.LateGate | None:
        """None for gates that pool the prompt, and for options the kernel does not know.

        A mask of experts belongs to the adapter: add it with `replace`.
        """
        if self.when != "token" or self.factor != 1 or self.skips_masked:
            return None
        with torch.no_grad():
            rows, e_EOE = self._rows[0], self.weight.float()
            b_RO, mean_R, gram_RR = self._frozen(rows, e_EOE)
            return gates.LateGate(
                be_RE=torch.einsum(
                    "ro,roe->re", b_RO, e_EOE[rows.spans.row_slot_R.to(e_EOE.device)]
                ),
                mean_R=mean_R,
                gram_RR=gram_RR / (e_EOE.shape[0] * e_EOE.shape[1]),
                total_E=e_EOE.sum(dim=(0, 1)),
                inv_tau=float(torch.exp(-self.log_tau)),
                eps=NORM_EPS,
            )

    def _frozen(self, rows: Rows, t_NR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(s B [R, O], its mean over all N d_o entries [R], block-diagonal Gram [R, R])."""
        key = (rows.b.data_ptr(), rows.b._version, t_NR.dtype, t_NR.device)
        slot_R = rows.spans.row_slot_R.to(t_NR.device)
        b_RO = rows.b.detach().to(t_NR.dtype) * rows.spans.row_scale_R.to(t_NR).unsqueeze(1)
        if self._gram is None or self._gram[0] != key:
            same_RR = slot_R.unsqueeze(0) == slot_R.unsqueeze(1)
            with torch.inference_mode(
                False
            ):  # kept, so a later backward pass must be able to use them
                wide_RO = b_RO.clone()
                gram_RR = (wide_RO @ wide_RO.T) * same_RR.clone()
                mean_R = wide_RO.sum(1) / (self.num_experts * wide_RO.shape[1])
            self._gram = (key, mean_R, gram_RR)
        return b_RO, self._gram[1], self._gram[2]


class MoLEMethod(Method):
    name = "mole"
    title = "MoLE"
    paper = "arXiv 2404.13628"
    granularity = "expert (frozen LoRAs)"
    routing_unit = "token"
    servability: Servability = "per_token"
    config_class = MoLEConfig
    default_learning_rate = (
        1e-3  # ours, for pooled gates; the paper's 1e-5 is for its flattened gate
    )
    needs_adapters = True
    trains_rows = False
    config: MoLEConfig

    def __init__(self, config: MoLEConfig):
        super().__init__(config)
        self._units: dict[str, str] = {}
        if config.pool != "token":
            self.servability = "per_request"  # gates are fixed once the prompt is read

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        firsts: dict[str, Site] = {}
        self._units = {}
        for site in sites:
            first = firsts.setdefault(self._unit_key(site), site)
            self._units[site.path] = first.path
        gates: dict[str, Router] = {
            site.path: LateGate(self.config, site.d_out) for site in firsts.values()
        }
        if self.config.share_tau:
            shared = next(iter(gates.values())).log_tau
            for gate in gates.values():
                gate.log_tau = shared
        return gates

    def _unit_key(self, site: Site) -> str:
        return {
            "matrix": site.path,
            "layer": site.block,
            "block": site.layer_path,
            "network": "",
        }[self.config.granularity]

    def unit_of(self, site: Site) -> str | None:
        return self._units.get(site.path)

    def aux_losses(self, records: Sequence[RouteRecord]) -> dict[str, Tensor]:
        """alpha * (-sum log q_i - E log E), q the mean gate over units and tokens (Eq. 14-15); 0 = balanced."""
        if not records or self.config.router_aux_loss_coef == 0:
            return {}
        return {"balance": self.config.router_aux_loss_coef * balance(records)}


def balance(records: Sequence[RouteRecord]) -> Tensor:
    """-sum log q minus its least value, so that 0 means balanced. The mean is taken before the log."""
    means = []
    for record in records:
        assert record.valid is not None
        means.append(mean_over(record.gates, record.valid))
    q_E = torch.stack(means).mean(0).clamp_min(BALANCE_FLOOR)
    return -q_E.log().sum() - len(q_E) * math.log(len(q_E))


METHOD = MoLEMethod
