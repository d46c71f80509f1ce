"""FFN rows of a step: tokens whose adapter routes them to K experts become K rows between the entry and exit linears.

Pairs of routed entries come first (token by token, K each; slots and weights are written by the router in every
step), then those of all other entries, moved from tokens to the tokens' first rows. Entry and exit linears share
slots; the weights of routed pairs are 1 at the entry and the router's at the exit.

Letters: N tokens, M rows, P pairs, K experts chosen, S sites of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loramux.core.types import Route, Site
from loramux.engine.program import Entry, Program
from loramux.ops.contract import Pairs, RowMap
from loramux.ops.gates import TopKCall, TopKGate


@dataclass(frozen=True, eq=False)
class Routed:
    """An entry that is rows here, how many per token, and where its pairs begin."""

    entry: Entry
    k: int
    pair: int


@dataclass(eq=False)
class BlockRows:
    """Rows and pairs of one block; `weights` holds one row per site of the block."""

    map: RowMap
    routed: list[Routed]
    moved: Tensor  # int64: columns of the program's pairs that are still in effect here
    sites: tuple[int, ...]
    enter: dict[int, Pairs] = field(default_factory=dict)
    exit: dict[int, Pairs] = field(default_factory=dict)
    moved_at: dict[int, int] = field(default_factory=dict)  # id of an entry -> its first pair here
    call: TopKCall | None = None
    refreshes: bool = (
        False  # whether a gate outside the block weighs pairs in it, anew in every step
    )
    bias_N: Tensor | None = None
    first_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def pairs_at(self, site: int, role: str) -> Pairs:
        return (self.exit if role == "exit" else self.enter)[site]

    def refresh(self, program: Program) -> None:
        """Take over weights that were decided since the rows were laid out."""
        if self.moved.shape[0] == 0:
            return
        start = sum(r.entry.count * r.k for r in self.routed)
        for pairs_of in (self.enter, self.exit):
            for site, pairs in pairs_of.items():
                pairs.weight[start:] = program.weight[program.row_of(site)][self.moved]


def lay_out(
    program: Program, block: Sequence[tuple[int, Site]], chosen: Sequence[tuple[Entry, int]]
) -> BlockRows:
    """`block`: (index, site) of its linears; `chosen`: routed entries and how many experts a token of theirs gets."""
    count_N = torch.ones(program.num_tokens, dtype=torch.long)
    for entry, k in chosen:
        count_N[entry.tokens] = k
    first_N = count_N.cumsum(0) - count_N
    token_M = torch.arange(program.num_tokens, dtype=torch.int32).repeat_interleave(count_N)
    num_rows = int(token_M.shape[0])
    routed, tokens, rows, at = [], [], [], 0
    for entry, k in chosen:
        routed.append(Routed(entry, k, at))
        at += entry.count * k
        own_nK = first_N[entry.tokens].unsqueeze(1) + torch.arange(k)
        rows.append(own_nK.reshape(-1).int())
        tokens.append(token_M[own_nK.reshape(-1)])
    moved = _unrouted(program, {id(entry) for entry, _ in chosen})
    plain_token = program.token.cpu()[moved]
    token_P = torch.cat([*tokens, plain_token])
    row_P = torch.cat([*rows, first_N[plain_token.long()].int()])
    slot_P = torch.cat([torch.zeros(at, dtype=torch.int32), program.slot.cpu()[moved]])
    device = program.device
    token_P, row_P, slot_P = token_P.to(device), row_P.to(device), slot_P.to(device)
    weight_M = torch.ones(num_rows, dtype=torch.float32, device=device)
    found = BlockRows(
        RowMap(token_M.to(device), weight_M, program.num_tokens),
        routed,
        moved.to(device),
        tuple(index for index, _ in block),
        first_N=first_N.to(device),
    )
    shared: dict[tuple[str, int], Pairs] = {}
    for index, site in block:
        is_exit = site.role == "exit"
        key = (site.role, program.row_of(index))
        if key not in shared:
            weight_P = torch.ones(token_P.shape[0], dtype=torch.float32, device=device)
            ends = (row_P, token_P, slot_P, weight_P, num_rows, program.num_tokens)
            starts = (token_P, row_P, slot_P, weight_P, program.num_tokens, num_rows)
            shared[key] = Pairs(*(ends if is_exit else starts))
        (found.exit if is_exit else found.enter)[index] = shared[key]
    found.refresh(program)
    inside = set(found.sites)
    found.refreshes = (
        any(
            not inside.isdisjoint(unit.sites) and path not in {site.path for _, site in block}
            for path, waiting in program.late.items()
            for _, unit in waiting
        )
        or any(
            not inside.isdisjoint(entry.facts.governed[path])
            for path, entries in program.layers.items()
            for entry in entries
        )
        or any(
            not inside.isdisjoint(entry.facts.governed[path])
            for entry in program.entries
            for path in entry.facts.hidden
        )
    )
    found.moved_at = _places(program, {id(entry) for entry, _ in chosen}, at)
    return found


def _unrouted(program: Program, routed: set[int]) -> Tensor:
    parts = [
        torch.arange(entry.pair, entry.pair + entry.num_pairs)
        for entry in program.entries
        if id(entry) not in routed and entry.num_pairs
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _places(program: Program, routed: set[int], at: int) -> dict[int, int]:
    places = {}
    for entry in program.entries:
        if id(entry) not in routed:
            places[id(entry)] = at
            at += entry.num_pairs
    return places


def attach_gates(rows: BlockRows, path: str) -> None:
    """Let the kernel route the entries whose router it knows."""
    gates: list[TopKGate] = []
    slots, token, gate, pair, row = [], [], [], [], []
    for own in rows.routed:
        known = own.entry.facts.blocks[path].gate
        if known is None:
            continue
        n = own.entry.count
        step = torch.arange(n, dtype=torch.int32)
        token.append(step + own.entry.first)
        gate.append(torch.full((n,), len(gates), dtype=torch.int32))
        pair.append(own.pair + step * own.k)
        row.append(rows.first_N[own.entry.tokens].int().cpu())
        slots.append(own.entry.slots[0])
        gates.append(known)
    if not gates:
        return
    # One exit linear closes an FFN; all entry linears share slots, and their routed weights stay 1.
    enter, leave = next(iter(rows.enter.values())), next(iter(rows.exit.values()))
    arrays = (torch.cat(token), torch.cat(gate), torch.cat(pair), torch.cat(row))
    rows.call = TopKCall(gates, slots, *arrays, enter, leave, rows.map)


def widened(route: Route, num_experts: int) -> Route:
    """The same choice with a column for every expert, the unchosen empty.

    The number of a token's rows must not depend on its numbers: torch rounds a product of more rows otherwise, so one
    request would move the bits of another.
    """
    assert route.slot is not None and route.weight is not None
    missing = num_experts - route.slot.shape[1]
    slot = torch.nn.functional.pad(route.slot, (0, missing), value=-1)
    return replace(route, slot=slot, weight=torch.nn.functional.pad(route.weight, (0, missing)))


def take_routes(rows: BlockRows, routes: Mapping[int, Route]) -> None:
    """What routers decided in torch (by id of the entry), written where the kernel would have written it."""
    for own in rows.routed:
        route = routes.get(id(own.entry))
        if route is None:
            continue
        assert route.slot is not None and route.weight is not None
        n = own.entry.count
        slots = torch.tensor(own.entry.slots, device=route.slot.device)
        chosen = slots[route.slot.clamp_min(0)].masked_fill(route.slot < 0, -1)
        at = slice(own.pair, own.pair + n * own.k)
        weight = route.weight.to(torch.float32)
        for pairs in (*rows.enter.values(), *rows.exit.values()):
            pairs.slot[at] = chosen.reshape(-1).int()
        for pairs in rows.exit.values():
            pairs.weight[at] = weight.reshape(-1)
        first = rows.first_N[own.entry.tokens].unsqueeze(1)
        place = (first + torch.arange(own.k, device=first.device)).reshape(-1)
        rows.map.weight[place] = weight.reshape(-1)
    if not all(route.sums_to_one for route in routes.values()):
        total_N = torch.zeros(rows.map.num_tokens, device=rows.map.weight.device)
        rows.bias_N = total_N.index_add(0, rows.map.token.long(), rows.map.weight)
