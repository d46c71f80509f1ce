"""Lowering: from routes to the flat pairs of the kernel contract, for one site and one forward pass.

Letters: N tokens of the batch, n tokens of one adapter, M FFN rows, Q requests, K chosen experts, E experts of a site,
R rank rows, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loramux.core.adapter import Adapter
from loramux.core.bank import Acting, Rows
from loramux.core.types import Route, Site
from loramux.ops.contract import Pairs, RowMap, Spans
from loramux.ops.cpu_bound import Bound

Apply = Callable[..., Tensor]


@dataclass(eq=False)
class Member:
    """One adapter in a batch and the tokens that are its own (None: all of them, in order)."""

    adapter: Adapter
    token_n: Tensor | None  # int64 [n]
    request_n: Tensor  # int64 [n], request of each own token
    num_tokens: int

    def own(self, value_N: Tensor) -> Tensor:
        return value_N if self.token_n is None else value_N[self.token_n]


@dataclass(eq=False)
class RowLayout:
    """The rows of an FFN block: the map of the whole batch and where each member's rows are."""

    map: RowMap
    rows_of: dict[str, Tensor | None]  # adapter -> int64 [n, K]; None: all rows, token-major
    first_N: Tensor | None  # row of every token that has just one; None when rows are uniform
    bias_N: Tensor | None = (
        None  # sum of a token's row weights, where it is not 1: what the exit's bias is worth
    )


@dataclass(frozen=True, eq=False)
class OwnRows:
    """Rows of a call that belong to one adapter: read from `src`, written to `dst` (int64 [n])."""

    src: Tensor
    dst: Tensor


@dataclass(eq=False)
class Dense:
    """How every own token weighs all rank rows of a site: u = t * w without a pair per token and expert.

    weight [n, E] (None: 1), mask [n, R] (None: 1) and the rows of the call that are the adapter's own.
    """

    weight_nE: Tensor | None
    mask_nR: Tensor | None
    own: OwnRows | None

    def weigh(self, t_nR: Tensor, spans: Spans, tied: int) -> Tensor:
        """u [n, R], scales included. Combined in wide precision, rounded once. For tied experts t is [n, r]."""
        wide = torch.promote_types(t_nR.dtype, torch.float32)
        scale_R = spans.row_scale_R.to(t_nR.device, wide)
        mask_nR = self.mask_nR
        if self.weight_nE is None:
            w_nR = scale_R if mask_nR is None else mask_nR.to(wide) * scale_R
            return (t_nR.repeat(1, tied) if tied else t_nR) * w_nR.to(t_nR.dtype)
        num, rank = spans.num_slots, spans.max_rank
        if mask_nR is None and min(spans.rank) == rank:  # one weight for all rows of an expert
            scale_E = scale_R.view(num, rank)[:, 0]
            w_nE1 = (self.weight_nE.to(wide) * scale_E).to(t_nR.dtype).unsqueeze(2)
            t_nEr = t_nR.unsqueeze(1) if tied else t_nR.view(-1, num, rank)
            return (t_nEr * w_nE1).reshape(-1, spans.num_rows)
        w_nR = self.weight_nE.to(wide)[:, spans.row_slot_R.to(t_nR.device)] * scale_R
        if mask_nR is not None:
            w_nR = w_nR * mask_nR
        return (t_nR.repeat(1, tied) if tied else t_nR) * w_nR.to(t_nR.dtype)


@dataclass(eq=False)
class Part:
    """One adapter's share of a call at a site: as pairs, or dense where all experts are weighed."""

    rows: Rows | Acting
    pairs: Pairs | None
    apply: Apply
    dropout: float = 0.0
    late: Any = None  # a dispatch.Late, for gates that read t
    dense: Dense | None = None

    def drop(self, x: Tensor) -> tuple[Tensor, Pairs]:
        """Dropout on the adapter's input: one mask per (row of the call, expert), as the papers' code does."""
        pairs = self.pairs
        assert pairs is not None
        if not pairs.identity and pairs.num_pairs != pairs.num_src:
            x = x[pairs.src.long()]
            own = torch.arange(pairs.num_pairs, dtype=torch.int32, device=x.device)
            pairs = replace(pairs, src=own, num_src=pairs.num_pairs, cache={})
        return torch.nn.functional.dropout(x, self.dropout), pairs


@dataclass(eq=False)
class Plan:
    """What a LoraLinear does in this forward pass. `lead_out`: leading shape of its output, () = that of its input."""

    backend: str
    parts: list[Part]
    row_map: RowMap | None = None
    bias_N: Tensor | None = None
    lead_out: tuple[int, ...] = ()
    is_used: bool = False
    bound: Bound | None = None  # the whole call, looked up, for plans that are used again and again


def layout_rows(
    num_tokens: int, routed: list[tuple[Member, Route]], device: torch.device
) -> RowLayout:
    """Give every token its FFN rows: K for tokens whose adapter routes them to K experts, one for the others."""
    layout = _layout(num_tokens, routed, device)
    if not all(route.sums_to_one for _, route in routed):
        rows = layout.map
        total_N = torch.zeros(num_tokens, dtype=rows.weight.dtype, device=device)
        layout.bias_N = total_N.index_add(0, rows.token.long(), rows.weight)
    return layout


def _layout(num_tokens: int, routed: list[tuple[Member, Route]], device: torch.device) -> RowLayout:
    if len(routed) == 1 and routed[0][0].token_n is None:
        member, route = routed[0]
        assert route.slot is not None and route.weight is not None
        k = route.slot.shape[1]
        token_M = torch.arange(num_tokens, dtype=torch.int32, device=device).repeat_interleave(k)
        rows = RowMap(token_M, route.weight.reshape(-1), num_tokens, uniform=k)
        return RowLayout(rows, {member.adapter.name: None}, None)
    count_N = torch.ones(num_tokens, dtype=torch.long, device=device)
    for member, route in routed:
        assert route.slot is not None
        count_N[member.token_n if member.token_n is not None else slice(None)] = route.slot.shape[1]
    first_N = count_N.cumsum(0) - count_N
    token_M = torch.arange(num_tokens, dtype=torch.int32, device=device).repeat_interleave(count_N)
    weight_M = torch.ones(token_M.shape[0], dtype=torch.float32, device=device)
    rows_of: dict[str, Tensor | None] = {}
    for member, route in routed:
        assert route.slot is not None and route.weight is not None
        k = route.slot.shape[1]
        own_nK = member.own(first_N).unsqueeze(1) + torch.arange(k, device=device)
        rows_of[member.adapter.name] = own_nK
        weight_M = weight_M.to(route.weight.dtype).index_put((own_nK,), route.weight)
    return RowLayout(RowMap(token_M, weight_M, num_tokens), rows_of, first_N)


def own_rows(site: Site, member: Member, layout: RowLayout | None) -> OwnRows | None:
    """Which rows of the call at `site` are the member's; None: all, in order."""
    token_n = member.token_n
    if token_n is None:
        return None
    if layout is None or layout.first_N is None:
        return OwnRows(token_n, token_n)
    row_n = layout.first_N[token_n]
    return OwnRows(token_n, row_n) if site.role == "enter" else OwnRows(row_n, token_n)


def lower_dense(
    site: Site, member: Member, route: Route, layout: RowLayout | None, mask_QR: Tensor | None
) -> Dense | None:
    """The weights of all experts for every own token; None where the route chooses experts by slot."""
    if route.slot is not None or (route.weight is None and mask_QR is None):
        return None
    weight_nE = route.weight
    if weight_nE is not None and route.per_request:
        weight_nE = weight_nE[member.request_n]
    if route.gate is not None and site.path in route.column:
        gate_n1 = route.gate[:, route.column[site.path]][member.request_n].unsqueeze(1)
        num = member.adapter.rows[site.path].spans.num_slots
        weight_nE = gate_n1.expand(-1, num) if weight_nE is None else weight_nE * gate_n1
    mask_nR = None if mask_QR is None else mask_QR[member.request_n]
    return Dense(weight_nE, mask_nR, own_rows(site, member, layout))


def lower(
    site: Site,
    member: Member,
    route: Route,
    layout: RowLayout | None,
    num_tokens: int,
    keep_zeros: bool,
) -> Pairs | None:
    """The pairs of one adapter at one site; None when nothing of it acts here.

    `keep_zeros`: keep pairs of weight 0 (training, where their weight may carry a gradient).
    """
    spans = member.adapter.rows[site.path].spans
    if layout is not None and site.role != "plain" and member.adapter.name in layout.rows_of:
        return _lower_rows(site, member, route, layout, num_tokens)
    device = member.request_n.device
    own = (
        torch.arange(num_tokens, dtype=torch.long, device=device)
        if member.token_n is None
        else member.token_n
    )
    slot_nK, weight_nK = _chosen(site, member, route, spans.num_slots, device)
    k = slot_nK.shape[1]
    src = dst = own.unsqueeze(1).expand(-1, k).reshape(-1)
    slot, weight = slot_nK.reshape(-1), weight_nK.reshape(-1)
    identity = member.token_n is None and k == 1
    if not keep_zeros:
        alive = (weight != 0) & (slot >= 0)
        if not bool(alive.all()):
            src = dst = src[alive]
            slot, weight = slot[alive], weight[alive]
            identity = False
    if src.shape[0] == 0:
        return None
    num_src = num_dst = num_tokens
    if layout is not None and layout.first_N is not None:  # one row per token of this adapter
        if site.role == "exit":
            src, num_src, identity = layout.first_N[src], layout.map.num_rows, False
        elif site.role == "enter":
            dst, num_dst, identity = layout.first_N[dst], layout.map.num_rows, False
    src_P = src.int()
    # One object where both are the same rows: a backend sees without comparing that nothing is gathered.
    dst_P = src_P if dst is src else dst.int()
    return Pairs(
        src_P, dst_P, slot.int(), weight, num_src, num_dst,
        identity=identity, one_slot=0 if spans.num_slots == 1 and route.slot is None else None,
    )  # fmt: skip


def _chosen(
    site: Site, member: Member, route: Route, num_slots: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(slot [n, K], weight [n, K]) of the own tokens, the site's gate multiplied in."""
    n = member.num_tokens
    slot = route.slot
    if slot is None:
        slot = torch.arange(num_slots, device=device).expand(n, num_slots)
    elif route.per_request:
        slot = slot[member.request_n]
    weight = route.weight
    if weight is None:
        weight = torch.ones(slot.shape, dtype=torch.float32, device=device)
    elif route.per_request:
        weight = weight[member.request_n]
    if route.gate is not None and site.path in route.column:
        weight = weight * route.gate[:, route.column[site.path]][member.request_n].unsqueeze(1)
    return slot, weight


def _lower_rows(
    site: Site, member: Member, route: Route, layout: RowLayout, num_tokens: int
) -> Pairs:
    assert route.slot is not None and route.weight is not None
    rows_nK = layout.rows_of[member.adapter.name]
    num_rows, token_M = layout.map.num_rows, layout.map.token
    row = (
        torch.arange(num_rows, dtype=torch.int32, device=token_M.device)
        if rows_nK is None
        else rows_nK.reshape(-1).int()
    )
    token = token_M if rows_nK is None else token_M[rows_nK.reshape(-1)]
    slot, weight = route.slot.reshape(-1).int(), route.weight.reshape(-1)
    if site.role == "enter":
        return Pairs(token, row, slot, torch.ones_like(weight), num_tokens, num_rows)
    return Pairs(row, token, slot, weight, num_rows, num_tokens)
