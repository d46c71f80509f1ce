"""From the routes of a forward pass to what each linear does now: its backend and its parts, as pairs or dense.

Letters: Q requests, R rank rows of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loramux.core.adapter import Adapter
from loramux.core.bank import Rows
from loramux.core.plan import Apply, Member, Part, Plan, RowLayout, lower, lower_dense
from loramux.core.router import Router
from loramux.core.state import Late, State
from loramux.core.types import Route, Site
from loramux.ops.choose import Choice, choose_backend, load_backend
from loramux.ops.contract import Pairs

KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # of adapter rows, in the C kernel


class Planner:
    """Answers the linears that ask what to do. What it is asked about is set by the dispatch."""

    def __init__(self, requested_backend: str = "auto"):
        self.requested_backend = requested_backend
        self.weight = torch.empty(0)  # a parameter of the model: its dtype follows model.to(...)
        self.unfused: set[str] = set()  # sites whose base the C kernel cannot compute
        self.state: State | None = None
        self.active: str | None = None
        self.rows: Sequence[str | None] | None = (
            None  # adapter of each request, inside handle.batch
        )
        self.rank_masks: dict[tuple[str, str], Tensor] = {}  # (adapter, site) -> factors [Q, R]
        self.choices: dict[str, str] = {}

    def run_router(
        self, state: State, member: Member, path: str, router: Router, own_nD: Tensor
    ) -> Route:
        raise NotImplementedError("the dispatch runs routers")

    @contextmanager
    def masking(self, adapter: Adapter, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, rank row i of site p acts in request q with factor masks[p][q, i]."""
        for path, mask in masks.items():
            rows = adapter.rows.get(path)
            if rows is None or mask.dim() != 2 or mask.shape[1] != rows.spans.num_rows:
                raise ValueError(
                    f"{adapter.name!r} cannot be masked at {path!r} with a mask of shape {tuple(mask.shape)}; masks "
                    "are [requests, rank rows] at the linears it is attached to"
                )
        before = self.rank_masks
        self.rank_masks = {
            **before,
            **{(adapter.name, path): mask for path, mask in masks.items()},
        }
        try:
            yield
        finally:
            self.rank_masks = before

    def plan(self, site: Site) -> Plan | None:
        """What the linear at `site` does now; None: nothing but its base."""
        state = self.state
        if state is None:
            if self.active is None and self.rows is None:
                return None
            raise RuntimeError(
                f"{site.path} was called outside a forward pass of the model it belongs to; call the model itself, "
                "or choose no adapter with handle.use(None)"
            )
        if site.path in state.plans:
            return state.plans[site.path]
        if site.path in state.step_plans:
            return state.step_plans[site.path]
        fixed = not any(m.adapter.routes_tokens_at(site) for m in state.members)
        plan = self._build(state, site, state.pairs if fixed else state.step_pairs)
        (state.plans if fixed else state.step_plans)[site.path] = plan
        return plan

    def _build(
        self, state: State, site: Site, known: dict[tuple[object, ...], Pairs | None]
    ) -> Plan | None:
        members = [m for m in state.members if site.path in m.adapter.rows]
        layout = state.layouts.get(site.block) if site.role != "plain" else None
        if not members and layout is None:
            return None
        choice = self._choice(state, site, members, layout)
        # A kernel for few rows reads what a route chose, pair by pair; torch is better off without pairs.
        dense = choice.name in ("reference", "grouped")
        parts = []
        for member in members:
            part = self._part(state, site, member, layout, known, dense)
            if part is not None:
                parts.append(part)
        backend, apply = self._backend(site, parts, choice)
        for part in parts:
            part.apply = apply
        if layout is None:
            return Plan(backend, parts)
        if site.role == "enter":
            return Plan(backend, parts, layout.map, lead_out=(1, layout.map.num_rows))
        return Plan(backend, parts, layout.map, layout.bias_N, state.batch.lead)

    def _part(
        self,
        state: State,
        site: Site,
        member: Member,
        layout: RowLayout | None,
        known: dict[tuple[object, ...], Pairs | None],
        dense: bool,
    ) -> Part | None:
        adapter = member.adapter
        rows = adapter.rows[site.path]
        if rows.spans.num_rows == 0:
            return None
        route = state.route(adapter, site)
        keep = state.needs_grad
        dropout = adapter.method.config.lora_dropout if state.training else 0.0
        unit = adapter.method.unit_of(site)
        mask_QR = self.rank_masks.get((adapter.name, site.path))
        if mask_QR is not None and not bool(mask_QR.any()):
            return None
        if rows.magnitude is None and unit is None and (dense or mask_QR is not None):
            weights = lower_dense(site, member, route, layout, mask_QR)
            if weights is not None:
                return Part(rows.acting(dense=True), None, _unset, dropout, dense=weights)
        if mask_QR is not None:
            raise ValueError(
                f"the ranks of {adapter.name!r} at {site.path} cannot be masked: it is DoRA, reads t or chooses by slot"
            )
        own = route.gate is not None or adapter.routes_site(site)
        where = site.path if own else site.block
        key = (adapter.name, where, site.role, rows.spans.num_slots, layout is not None)
        if key not in known:
            known[key] = lower(site, member, route, layout, state.batch.num_tokens, keep)
        pairs = known[key]
        if pairs is None:
            return None
        late = None
        if unit is not None:
            late = Late(self.run_router, state, member, unit, first=unit == site.path)
        return Part(rows.acting(dense=False), pairs, apply=_unset, dropout=dropout, late=late)

    def _choice(
        self, state: State, site: Site, members: list[Member], layout: RowLayout | None
    ) -> Choice:
        num_rows = state.batch.num_tokens if layout is None else layout.map.num_rows
        total_rank = sum(m.adapter.rows[site.path].spans.num_rows for m in members)
        # Token routes are lowered in every step, and the choice costs as much as a small linear.
        key = (num_rows, total_rank, self.weight.dtype, self.requested_backend)
        choice = state.choices.get(key)
        if choice is None:
            choice = state.choices[key] = choose_backend(
                device=state.batch.device,
                dtype=self.weight.dtype,
                num_rows=num_rows,
                needs_grad=state.needs_grad,
                total_rank=total_rank,
                requested=self.requested_backend,
            )
        return choice

    def _backend(self, site: Site, parts: list[Part], choice: Choice) -> tuple[str, Apply]:
        simple = all(
            isinstance(p.rows, Rows)
            and p.rows.magnitude is None
            and p.late is None
            and p.dense is None
            and p.dropout == 0
            and p.rows.a.dtype in KERNEL_DTYPES
            for p in parts
        )
        name, reason = choice.name, choice.reason
        if name == "cpu" and (site.path in self.unfused or not simple):
            name, reason = (
                "reference",
                "DoRA, gates that read t, Conv1D, quantised linears and fp16 or fp64 rows run in torch",
            )
        self.choices[name] = reason
        return name, load_backend(name)


def _unset(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a part was used before its backend was chosen")
