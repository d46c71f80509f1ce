"""A method made for tests: every linear has a softmax router over its experts that reads the linear's own input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import loramux
from loramux.core.adapter import Adapter
from loramux.core.bank import fresh_rows
from loramux.core.method import Method, MethodConfig
from loramux.core.router import Router, RouteView
from loramux.core.types import Expert, Route, Site


class Gate(Router):
    scope = "site"
    when = "token"

    def __init__(self, site: Site, num: int, sparse: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num, site.d_in) * 0.5)
        self.sparse = sparse
        self.tasks: list[tuple[str | None, ...] | None] = []

    def forward(self, view: RouteView, incoming: Route) -> Route:
        self.tasks.append(view.tasks)
        p_NE = (view.x_ND.to(self.weight.dtype) @ self.weight.T).softmax(-1)
        view.record(columns=tuple(map(str, range(p_NE.shape[1]))), weight=p_NE, valid=view.valid_N)
        if self.sparse:
            return Route(slot=torch.arange(p_NE.shape[1]).expand_as(p_NE), weight=p_NE)
        return Route(weight=p_NE)


class Factor(nn.Module):
    def __init__(self, num_rows: int):
        super().__init__()
        self.value = nn.Parameter(torch.linspace(0.5, 2.0, num_rows))

    def forward(self) -> Tensor:
        return self.value


class Gated(Method):
    name = "gated"
    title = "Gated"
    servability = "per_token"
    config_class = MethodConfig

    def __init__(
        self,
        ranks: Sequence[int] = (3, 3),
        *,
        sparse: bool = False,
        tied: bool = False,
        factor: bool = False,
        routed: bool = True,
    ):
        super().__init__(MethodConfig(r=3))
        self.ranks, self.sparse, self.tied = tuple(ranks), sparse, tied
        self.factor, self.routed = factor, routed

    def experts(self, site: Site) -> list[Expert]:
        return [Expert(rank, 0.5 + i) for i, rank in enumerate(self.ranks)]

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        torch.manual_seed(3)
        if not self.routed:
            return {}
        return {site.path: Gate(site, len(self.ranks), self.sparse) for site in sites}


def adapter(handle: loramux.Handle, method: Gated, name: str = "gated", seed: int = 0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    rows = {}
    for path, site in handle.sites.items():
        experts = method.experts(site)
        gate = Factor(sum(e.rank for e in experts)) if method.factor else None
        tied = len(experts) if method.tied else 0
        rows[path] = fresh_rows(site, experts, generator=draw, gate=gate, tied=tied)
        rows[path].b.data = torch.randn(rows[path].b.shape, generator=draw) * 0.3
    made = Adapter(name, method, handle.sites, rows, method.routers(list(handle.sites.values())))
    made.set_trainable(True)
    return made
