"""The state of one forward pass, and what outlives it: the routes that were decided on a prompt.

Letters: N tokens, E experts of a site, R rank rows, n tokens of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from loramux.core.adapter import Adapter
from loramux.core.batch import Batch
from loramux.core.plan import Member, OwnRows, Plan, RowLayout, own_rows
from loramux.core.router import Recorder, Router
from loramux.core.types import EVERYTHING, Route, Site
from loramux.ops.choose import Choice
from loramux.ops.contract import Pairs


@dataclass(eq=False)
class PromptStore:
    """Routes that were decided on the prompt, kept for as long as its KV cache or generation lives."""

    num_requests: int
    names: list[str | None]  # adapter of every request of the prompt
    routes: dict[tuple[str, str], Route] = field(default_factory=dict)
    decoding: dict[object, State] = field(default_factory=dict)


@dataclass(eq=False)
class State:
    """One forward pass."""

    batch: Batch
    members: list[Member]
    training: bool
    keeps: bool
    needs_grad: bool
    store: PromptStore
    prompt_done: bool
    tasks: tuple[str | None, ...] | None = None
    twin: Any = None  # the bare base's cache, until the call returns the one it belongs to
    recorder: Recorder = field(default_factory=Recorder)
    routes: dict[tuple[str, str], Route] = field(default_factory=dict)
    layouts: dict[str, RowLayout | None] = field(default_factory=dict)
    plans: dict[str, Plan | None] = field(default_factory=dict)
    pairs: dict[tuple[object, ...], Pairs | None] = field(default_factory=dict)
    step_plans: dict[str, Plan | None] = field(default_factory=dict)
    step_pairs: dict[tuple[object, ...], Pairs | None] = field(default_factory=dict)
    choices: dict[tuple[object, ...], Choice] = field(default_factory=dict)

    @cached_property
    def is_settled(self) -> bool:
        """Whether no router has to look at what arrives: there is none, or all of them decided on the prompt."""
        hooked = [r for m in self.members for _, r in m.adapter.hooked_routers()]
        return all(r.when == "prompt" and self.prompt_done for r in hooked)

    def tell_routers(self) -> None:
        """Let every router see what it decided in this forward pass, if gradients will follow."""
        for record in self.recorder.records.values() if self.needs_grad else ():
            member = next(m for m in self.members if m.adapter.name == record.adapter)
            member.adapter.routers[record.path].observed(record)

    def forget_step(self) -> None:
        """Drop what was lowered from per-token routes: the next step routes anew."""
        self.step_plans.clear()
        self.step_pairs.clear()

    def route(self, adapter: Adapter, site: Site) -> Route:
        """The innermost route that governs this site."""
        name = adapter.name
        governor = adapter.method.governor_of(site)
        if governor is not None:
            return self.routes[name, governor]
        if adapter.routes_site(site):
            found = self.routes.get((name, site.path))
            if found is not None:
                return found
        for path in (site.block, site.layer_path):
            found = self.routes.get((name, path))
            if found is not None:
                return found
        return EVERYTHING


@dataclass(eq=False)
class Late:
    """A gate that reads t = A x at the first site of its unit; the unit's later sites reuse its weights."""

    run_router: Callable[[State, Member, str, Router, Tensor], Route]
    state: State
    member: Member
    unit: str
    first: bool

    def own_rows(self, site: Site) -> OwnRows | None:
        """Which rows of the call at `site` are this adapter's; None: all, in order."""
        layout = self.state.layouts.get(site.block) if site.role != "plain" else None
        return own_rows(site, self.member, layout)

    def weights(self, t_nR: Tensor) -> Tensor:
        """[n, E] weights of the own tokens at this site."""
        state, adapter = self.state, self.member.adapter
        router = adapter.routers[self.unit]
        decided = (adapter.name, self.unit) in state.routes
        if router.when == "prompt" and state.prompt_done and decided:
            pass
        elif self.first:
            self.run_router(state, self.member, self.unit, router, t_nR)
        route = state.routes[adapter.name, self.unit]
        assert route.weight is not None
        return route.weight[self.member.request_n] if route.per_request else route.weight
