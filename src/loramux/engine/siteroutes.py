"""Routes that sum experts, as weights [n, E], and the routers of single linears that give them.

A router of a linear reads what the linear reads; a group computes all its linears at once, so all their routers run in
front of its call.

Letters: n tokens of an entry, E experts of an entry, I width of a linear's input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramux.core.types import Route
from loramux.engine.blockrows import BlockRows
from loramux.engine.latecalls import ask_routers
from loramux.engine.program import Entry, Program

if TYPE_CHECKING:
    from loramux.engine.linear import Group


def route_sites(program: Program, group: Group, x: Tensor) -> None:
    """Run the routers of a group's linears on what they are given, x [..., I], and fill in what they decide."""
    rows_in = x.reshape(-1, x.shape[-1])
    for path, site, index in zip(group.paths, group.sites, group.indices, strict=True):
        if site is None or index is None:
            continue
        rows = program.blocks.get(site.block) if site.role != "plain" else None
        for entries in program.sited_alike.get(path, ()):
            own = [_own_rows(e, rows_in, rows if site.role == "exit" else None) for e in entries]
            routes = ask_routers(entries, entries[0].facts.sited[path], own)
            for entry, route in zip(entries, routes, strict=True):
                gate_nE = dense(route, entry)
                program.fill(entry, (index,), gate_nE)
                if entry.facts.sited[path].when == "prompt":
                    program.keep(entry, (index,), gate_nE[0])
                if rows is not None:
                    _fill_rows(rows, entry, index, gate_nE)


def _own_rows(entry: Entry, rows_in: Tensor, rows: BlockRows | None) -> Tensor:
    """An entry's tokens among the rows of a call; `rows`: where the rows of an FFN's exit lie."""
    return rows_in[entry.tokens] if rows is None else rows_in[rows.first_N[entry.tokens]]


def _fill_rows(rows: BlockRows, entry: Entry, index: int, gate_nE: Tensor) -> None:
    """In a block that others route by rows the pairs of a site are its own."""
    start = rows.moved_at[id(entry)]
    flat = (gate_nE * entry.weight).reshape(-1)
    for pairs_of in (rows.enter, rows.exit):
        if index in pairs_of:
            pairs_of[index].weight[start : start + entry.num_pairs] = flat.to(
                pairs_of[index].weight
            )


def dense(route: Route, entry: Entry) -> Tensor:
    """[n, E] weights of a route that sums; 0 where an expert was not chosen or the site has fewer."""
    n, width = entry.count, entry.width
    weight, slot = route.weight, route.slot
    if route.per_request:
        weight = None if weight is None else weight[:1].expand(n, -1)
        slot = None if slot is None else slot[:1].expand(n, -1)
    given_E = weight if slot is None else slot
    experts = width if given_E is None else given_E.shape[1]
    if experts > width:
        entry.fail(
            f"{entry.content.method.title} routes {experts} experts as a sum inside an FFN block, where the engine "
            "expects rows; declare the router at the layer or at its sites"
        )
        return torch.zeros(n, width)
    if slot is None and weight is None:
        return torch.ones(n, width)
    if slot is None:
        assert weight is not None
        return torch.nn.functional.pad(weight.float(), (0, width - experts))
    given = torch.ones(slot.shape) if weight is None else weight.float()
    empty = torch.zeros(n, width, device=slot.device)
    return empty.scatter_add(1, slot.clamp_min(0), given.masked_fill(slot < 0, 0.0))
