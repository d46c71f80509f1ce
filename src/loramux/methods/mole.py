"""MoLE: learned gates over frozen trained LoRAs, one gate per unit of the model; only the gates are trained.

Wu, Huang, Wei, Mixture of LoRA Experts, ICLR 2024, arXiv 2404.13628. Several other papers share the name.
For a unit with experts E_i(x) = s_i B_i^T A_i x (the increments, not whole block outputs):

    z   = LayerNorm( concat_i E_i(x) )         no affine, over all N d_o entries
    eps = z @ e        e [N d_o, N], starts at zero
    G   = softmax(eps / tau)                   tau = exp(log_tau), starts at 1
    y   = W0 x + sum_i G_i E_i(x)

The N d_o vector is never built: with t = A x, concat @ e = sum_i t_i (s_i B_i e_i), and mean and variance are a
linear and a quadratic form in t. Units with several linears compute G at their first one and reuse it ("additive").

Letters: N tokens, Q requests, R rank rows of the site, O output width, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.bank import Rows
from loramux.core.method import Method, MethodConfig
from loramux.core.router import Router, RouteView, mean_over, segment_softmax, segment_sum
from loramux.core.types import Route, RouteRecord, Servability, Site, When
from loramux.core.values import check_not_negative
from loramux.ops import gates

NORM_EPS = 1e-5
NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
BALANCE_FLOOR = 1e-8


@dataclass(frozen=True, kw_only=True)
class MoLEConfig(MethodConfig):
    """adapters: folders of trained LoRAs (PEFT layout), in gate order. Their own ranks, scales and targets hold.

    granularity: "matrix" a gate per linear; "layer" per attention and per FFN of a layer; "block" per decoder layer;
    "network" one gate. pool: "token" a weight vector per token (ours: causal, works with a KV cache);
    "prompt_mean" one per request from its prompt, fixed afterwards. router_aux_loss_coef is the paper's alpha.
    """

    method = "mole"

    adapters: tuple[str, ...] = ()
    granularity: Literal["matrix", "layer", "block", "network"] = "layer"
    pool: Literal["token", "prompt_mean"] = "token"
    router_aux_loss_coef: float = 0.5
    share_tau: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.adapters, list):
            object.__setattr__(self, "adapters", tuple(self.adapters))
        if not isinstance(self.adapters, tuple) or not all(
            isinstance(folder, str) for folder in self.adapters
        ):
            raise ValueError(f"adapters must be a list of folders, got {self.adapters!r}")
        check_not_negative("router_aux_loss_coef", self.router_aux_loss_coef)
        if self.lora_dropout or self.use_dora:
            raise ValueError(
                "MoLE trains gates over frozen adapters: lora_dropout and use_dora do not apply"
            )


class LateGate(Router):
    """Reads t = A x of the unit's first linear and weighs the experts."""

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    reads: ClassVar[Literal["x", "t"]] = "t"

    def __init__(self, num_experts: int, d_out: int, pool: str, names: Sequence[str]):
        super().__init__()
        self.when: When = "token" if pool == "token" else "prompt"
        self.num_experts = num_experts
        self.names = tuple(names)
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
        eps_NE = self._logits(t_NR)
        if self.when == "prompt":
            ones_N = torch.zeros_like(eps_NE[:, 0])
            share_N = segment_softmax(ones_N, view.request_N, view.prompt_N, view.num_requests)
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
        return Route(weight=gate_NE, per_request=self.when == "prompt")

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
        """None for gates that pool the prompt. A mask of experts belongs to the adapter: add it with `replace`."""
        if self.when != "token":
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
        if config.pool == "prompt_mean":
            self.servability = "per_request"  # gates are fixed once the prompt is read

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        names = self.names
        firsts: dict[str, Site] = {}
        self._units = {}
        for site in sites:
            first = firsts.setdefault(self._unit_key(site), site)
            self._units[site.path] = first.path
        gates: dict[str, Router] = {
            site.path: LateGate(len(names), site.d_out, self.config.pool, names)
            for site in firsts.values()
        }
        if self.config.share_tau:
            shared = next(iter(gates.values())).log_tau
            for gate in gates.values():
                gate.log_tau = shared
        return gates

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in gate order: the part of their paths, from the end, that tells them apart."""
        return expert_names(self.config.adapters)

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


def expert_names(paths: Sequence[str]) -> tuple[str, ...]:
    """`runs/snips/adapter`, `runs/clinc/adapter` -> `snips`, `clinc`. Raises ValueError where paths are equal."""
    parts = [PurePath(path).parts for path in paths]
    for back in range(1, min((len(p) for p in parts), default=0) + 1):
        names = [NOT_IN_NAMES.sub("-", p[-back].lower()).strip("-._") or "adapter" for p in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    raise ValueError(
        f"the adapters need folders that differ in one part of their path, got {list(paths)}"
    )


def balance(records: Sequence[RouteRecord]) -> Tensor:
    """-sum log q minus its least value, so that 0 means balanced. The mean is taken before the log."""
    means = []
    for record in records:
        assert record.valid is not None
        means.append(mean_over(record.gates, record.valid))
    q_E = torch.stack(means).mean(0).clamp_min(BALANCE_FLOOR)
    return -q_E.log().sum() - len(q_E) * math.log(len(q_E))


METHOD = MoLEMethod
