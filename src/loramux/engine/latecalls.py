"""Late gates of a step: who reads t = A x at which site, in the kernel where it can, in torch where it cannot.

A gate decides at the first site of its unit; its weights are then copied to the unit's other sites.

Letters: n tokens of an entry, E experts, R rank rows of an adapter at the site, P pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loramux.core.router import Router, RouteView
from loramux.core.types import EVERYTHING, Route
from loramux.engine.blockrows import BlockRows
from loramux.engine.facts import LateUnit
from loramux.engine.program import Entry, Program
from loramux.ops.contract import Pairs
from loramux.ops.gates import LateCall, LateGate

log = logging.getLogger(__name__)
Waiting = Sequence[tuple[Entry, LateUnit]]


@dataclass(eq=False)
class LatePlan:
    """Gates that read at one site. `kernel` run inside the group's call, `torch` before it."""

    role: str
    kernel: list[tuple[Entry, LateUnit]]
    torch: list[tuple[Entry, LateUnit]]
    rows: BlockRows | None
    call: LateCall | None = None
    is_shared: bool = False  # the kernel itself writes the weights of the unit's other sites

    @classmethod
    def make(
        cls,
        role: str,
        waiting: Waiting,
        rows: BlockRows | None,
        pairs: Pairs,
        program: Program | None,
    ) -> LatePlan:
        """`program`: None where nothing runs in the kernel."""
        kernel = [(e, u) for e, u in waiting if program is not None and u.gate is not None]
        chosen = {id(entry) for entry, _ in kernel}
        plan = cls(role, kernel, [w for w in waiting if id(w[0]) not in chosen], rows)
        if kernel and program is not None:
            also = _others(plan, pairs, program)
            plan.is_shared = also is not None
            plan.call = _late_call(plan, also or [])
        return plan

    def source(self, entry: Entry) -> Tensor:
        """Rows of the call that are an entry's tokens, [n]: the exit of an FFN reads rows."""
        if self.rows is not None and self.role == "exit":
            return self.rows.first_N[entry.tokens]
        return torch.arange(entry.first, entry.first + entry.count)

    def pair_of(self, entry: Entry) -> int:
        return entry.pair if self.rows is None else self.rows.moved_at[id(entry)]


def _others(plan: LatePlan, pairs: Pairs, program: Program) -> list[Tensor] | None:
    """Weights of the unit's other sites over pairs that lie alike; None where sharing takes more than a copy."""
    units = {unit.sites for _, unit in plan.kernel}
    if len(units) > 1:
        return None
    (sites,) = units
    if plan.rows is None:
        found = [program.weight[program.row_of(site)] for site in sites]
    else:
        held = {**plan.rows.enter, **plan.rows.exit}
        if not set(sites) <= held.keys():
            return None
        found = [held[site].weight for site in sites]
    apart = {weight.data_ptr(): weight for weight in found}
    apart.pop(pairs.weight.data_ptr(), None)
    return list(apart.values())


def _late_call(plan: LatePlan, also: list[Tensor]) -> LateCall:
    gates: list[LateGate] = []
    token, gate, pair = [], [], []
    for number, (entry, unit) in enumerate(plan.kernel):
        assert unit.gate is not None
        gates.append(unit.gate)
        token.append(plan.source(entry).int().cpu())
        gate.append(torch.full((entry.count,), number, dtype=torch.int32))
        step = torch.arange(entry.count, dtype=torch.int32)
        pair.append(plan.pair_of(entry) + step * entry.width)
    return LateCall(gates, torch.cat(token), torch.cat(gate), torch.cat(pair), also)


def run_late(plan: LatePlan, program: Program, x: Tensor) -> None:
    """Run the gates that the kernel does not, on the rows `x` of the call."""
    for entry, unit in plan.torch:
        route = _ask(entry, unit.router, unit.path, x[plan.source(entry).to(x.device)])
        weight_nE = route.weight
        assert weight_nE is not None
        if route.per_request:
            program.keep(entry, unit.sites, weight_nE[0])
            weight_nE = weight_nE[:1].expand(entry.count, -1)
        _spread(plan, program, entry, unit, weight_nE)


def share_late(plan: LatePlan, program: Program, pairs: Pairs) -> None:
    """Copy what the kernel wrote at a unit's first site to its other sites."""
    if plan.is_shared or (plan.rows is None and not program.differs):
        return  # written already, or all sites read one row of weights
    for entry, unit in plan.kernel:
        start = plan.pair_of(entry)
        weight_nE = pairs.weight[start : start + entry.num_pairs].view(entry.count, -1)
        _spread(plan, program, entry, unit, weight_nE)


def _spread(
    plan: LatePlan, program: Program, entry: Entry, unit: LateUnit, weight_nE: Tensor
) -> None:
    program.fill(entry, unit.sites, weight_nE)
    if plan.rows is None:
        return
    start = plan.pair_of(entry)
    flat = weight_nE.reshape(-1)
    own = set(unit.sites)
    for pairs_of in (plan.rows.enter, plan.rows.exit):
        for site, pairs in pairs_of.items():
            if site in own:
                pairs.weight[start : start + entry.num_pairs] = flat


def _ask(entry: Entry, router: Router, path: str, x_nD: Tensor) -> Route:
    """Run a router that reads t on the entry's own rows."""
    rows = entry.content.adapter.rows[path]
    t_nR = torch.nn.functional.linear(x_nD, rows.a.to(x_nD.dtype))
    return ask_router(entry, router, t_nR)


def ask_router(entry: Entry, router: Router, own_nD: Tensor) -> Route:
    """Run a router on the rows of one entry, as if it were alone. If it fails it ends its own request only: its route
    weighs nothing, and the engine reads the failure after the step.
    """
    if entry.sample.failure is None:
        try:
            return _run_router([entry], router, own_nD)
        except Exception as error:
            log.exception("request %s: a router failed", entry.sample.request_id)
            entry.fail(f"the router of {entry.content.method.title} failed: {error}")
    return Route(weight=torch.zeros(own_nD.shape[0], entry.width, device=own_nD.device))


def ask_routers(entries: Sequence[Entry], router: Router, own: Sequence[Tensor]) -> list[Route]:
    """The routes of entries of one content, one token each, in one call of their router; of a single entry whatever it
    is. Where the call fails they are asked one by one, so that only who is at fault ends.
    """
    if len(entries) > 1 and all(entry.sample.failure is None for entry in entries):
        try:
            route = _run_router(entries, router, torch.cat(list(own)))
            return [_row_of(route, row) for row in range(len(entries))]
        except Exception:
            log.debug("a router failed on %d requests at once", len(entries))
    return [ask_router(entry, router, x_nD) for entry, x_nD in zip(entries, own, strict=True)]


def _row_of(route: Route, row: int) -> Route:
    at = slice(row, row + 1)
    return replace(
        route,
        slot=None if route.slot is None else route.slot[at],
        weight=None if route.weight is None else route.weight[at],
        gate=None if route.gate is None else route.gate[at],
    )


def _run_router(entries: Sequence[Entry], router: Router, own_nD: Tensor) -> Route:
    """One entry, or several of one token each."""
    n, entry = own_nD.shape[0], entries[0]
    device = own_nD.device
    request_N = torch.zeros(n, dtype=torch.long, device=device)
    if len(entries) > 1:
        request_N = torch.arange(n, device=device)
    prompt = torch.arange(n, device=device) < entry.prompt_left
    mask = entry.content.adapter.mask
    view = RouteView(
        x_ND=own_nD,
        request_N=request_N,
        prompt_N=prompt,
        valid_N=torch.ones(n, dtype=torch.bool, device=device),
        num_requests=len(entries),
        training=False,
        record=_no_record,
        mask_E=None if mask is None else torch.tensor(mask, device=device),
        tasks=tuple(one.sample.request.task for one in entries),
    )
    route: Route = router(view, EVERYTHING)
    return route


def _no_record(**_: object) -> None:
    """The engine keeps what was decided with the sequence; nothing else is recorded."""
