"""The group call on a device: base linears in torch, then two Triton kernels per linear over the slot table's arena.

Nothing here waits for the device or depends on what the slots hold, so a call whose pairs stay where they are can be
captured as a graph. Inference only; Triton is imported on first use.

Letters: N tokens, M FFN rows, P pairs, D destination rows, r widest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.arena import ArenaTable
from loramux.ops.contract import Pairs, RowMap
from loramux.ops.rows import fold_rows, to_rows

KEY = "pool triton"


class Linear(Protocol):
    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def site(self) -> int | None: ...


def group_triton(
    x: Tensor,
    members: Sequence[Linear],
    table: ArenaTable,
    pairs: Sequence[Pairs | None],
    *,
    enter: RowMap | None = None,
    exit: RowMap | None = None,
) -> list[Tensor]:
    """`group_linear` without late gates; with DoRA gains where every pair reads the row it writes."""
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows if exit is None else fold_rows(rows, exit)
    outputs = []
    for member, own in zip(members, pairs, strict=True):
        base = functional.linear(tokens, member.weight)
        y = base if member.bias is None else base + member.bias
        y = y if enter is None else to_rows(y, enter)
        if own is not None and member.site is not None:
            add_triton(y, rows, table, member.site, own, None if exit is not None else base)
        lead = x.shape[:-2]
        outputs.append(y.view(*lead, y.shape[0] // (lead.numel() if lead else 1), y.shape[1]))
    return outputs


def add_triton(
    y: Tensor, x: Tensor, table: ArenaTable, site: int, pairs: Pairs, base: Tensor | None = None
) -> Tensor:
    """y += LoRA. `base`: W x of the source rows without bias, for slots with a DoRA gain; None: there are none such."""
    from loramux.ops import pool_triton_kernels

    if pairs.num_pairs == 0:
        return y
    t_Pr = torch.empty(pairs.num_pairs, table.max_rank, dtype=torch.float32, device=x.device)
    columns = {name: column[site] for name, column in table.tables.items()}
    pool_triton_kernels.shrink(t_Pr, x.contiguous(), table.arena, columns, pairs)
    pool_triton_kernels.expand(y, t_Pr, table.arena, columns, by_destination(pairs), pairs, base)
    return y


@dataclass(frozen=True, eq=False)
class Destinations:
    """Pairs by destination: order[begin[d]..begin[d+1]) are those of row d, in their given order."""

    order: Tensor
    begin: Tensor


def set_destinations(pairs: Pairs, known: Destinations) -> None:
    """For pairs whose order somebody else keeps up to date."""
    pairs.cache[KEY] = known


def by_destination(pairs: Pairs) -> Destinations:
    """Worked out once per route; waits for the device then."""
    held = pairs.cache.get(KEY)
    if held is None:
        order = torch.argsort(pairs.dst, stable=True).to(torch.int32)
        count = torch.bincount(pairs.dst, minlength=pairs.num_dst)
        begin = torch.zeros(pairs.num_dst + 1, dtype=torch.int32, device=pairs.dst.device)
        begin[1:] = count.cumsum(0)
        held = pairs.cache[KEY] = Destinations(order, begin)
    return cast(Destinations, held)
