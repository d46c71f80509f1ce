"""Linears that read the same input, for a whole batch: base and the adapters of all its requests in one call.

    y_m = W_m x + bias_m + sum over pairs p with dst[p] = d of  B[slot]^T (scale * weight[p] * (A[slot] x[src[p]]))

With a DoRA gain c of the slot a pair adds  weight * ((c - 1) * W x + c * scale * B^T A x)  instead.
Rows may enter or leave an FFN as in ops/cpu.py. A row's bits never depend on the other rows of the call.

Letters: N tokens, M FFN rows, P pairs, r rank, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loramux.ops.arena import ArenaTable
from loramux.ops.choose import MAX_TRITON_ROWS, why_not
from loramux.ops.contract import Pairs, RowMap
from loramux.ops.cpu_structs import TYPES
from loramux.ops.gates import LateCall
from loramux.ops.pool_kernel import kernel
from loramux.ops.pool_structs import BoundGroup, add
from loramux.ops.pool_torch import apply_torch, group_torch, refuse_gains, write_late
from loramux.ops.pool_triton import add_triton, group_triton
from loramux.ops.slots import PackedRows, SlotTable

__all__ = [
    "ArenaTable",
    "Member",
    "PackedRows",
    "SlotTable",
    "apply_many",
    "bind_group",
    "group_linear",
    "group_linear_torch",
    "max_rows",
]

group_linear_torch = group_torch


@dataclass(frozen=True, eq=False)
class Member:
    """One linear of a group: weight [O, I], and its number among the table's sites (None: never an adapter)."""

    weight: Tensor
    bias: Tensor | None = None
    site: int | None = None


def group_linear(
    x: Tensor,
    members: Sequence[Member],
    table: SlotTable | None,
    pairs: Sequence[Pairs | None],
    *,
    enter: RowMap | None = None,
    exit: RowMap | None = None,
    gate: LateCall | None = None,
) -> list[Tensor]:
    """One output per member. x is [N, I] or [1, N, I] ([.., M, I] for `exit`); outputs keep the leading 1."""
    return bind_group(members, table, pairs, enter=enter, exit=exit, gate=gate)(x)


def bind_group(
    members: Sequence[Member],
    table: SlotTable | None,
    pairs: Sequence[Pairs | None],
    *,
    enter: RowMap | None = None,
    exit: RowMap | None = None,
    gate: LateCall | None = None,
) -> Callable[[Tensor], list[Tensor]]:
    """`group_linear` for a step that repeats: everything looked up once, outputs new in every call.

    Slots and weights inside `pairs` and `enter`/`exit` may be written in place between calls, the slot table too;
    tensors must not be replaced.
    """

    def in_torch(x: Tensor) -> list[Tensor]:
        return group_torch(x, members, table, pairs, enter=enter, exit=exit, gate=gate)

    if isinstance(table, ArenaTable):
        return partial(
            _on_device, members=members, table=table, pairs=pairs, enter=enter, exit=exit, gate=gate
        )
    if kernel().group is None or not _runs(members):
        return in_torch
    return BoundGroup(members, table, pairs, enter, exit, gate, in_torch).run


FEW_ROWS = 16  # vector instructions: the work grows with every row
TILED_ROWS = 128  # AMX, before a block of W is turned for all rows
NO_LIMIT = 1 << 31


def max_rows(
    members: Sequence[Member], table: SlotTable | None = None, *, enters: bool = False
) -> int:
    """Up to how many rows of x `group_linear` is quicker than torch's linears and `apply_many`; 0: never.

    Measured on CPUs; `enters`: tokens become FFN rows. On a device, decode steps are to run as calls that do not wait.
    """
    if isinstance(table, ArenaTable):
        weight = members[0].weight
        return 0 if why_not("triton", weight.device, weight.dtype, False) else MAX_TRITON_ROWS
    if kernel().group is None or not _runs(members):
        return 0
    if kernel().variant != "amx" or members[0].weight.dtype is not torch.bfloat16:
        return FEW_ROWS
    is_whole = all(m.weight.shape[1] % 32 == 0 and m.weight.shape[0] % 16 == 0 for m in members)
    return NO_LIMIT if is_whole and not enters else TILED_ROWS if is_whole else FEW_ROWS


def _on_device(
    x: Tensor,
    members: Sequence[Member],
    table: ArenaTable,
    pairs: Sequence[Pairs | None],
    enter: RowMap | None,
    exit: RowMap | None,
    gate: LateCall | None,
) -> list[Tensor]:
    """Triton where it runs and knows how; DoRA where rows leave an FFN needs the base of every row, so torch."""
    rescales = exit is not None and any(
        m.site is not None and (table.gain_at[m.site] != table.nothing).any() for m in members
    )
    if rescales or why_not("triton", x.device, x.dtype, needs_grad=False):
        return group_torch(x, members, table, pairs, enter=enter, exit=exit, gate=gate)
    if gate is not None:
        write_late(x, members[0], table, pairs[0], gate)
    return group_triton(x, members, table, pairs, enter=enter, exit=exit)


def _runs(members: Sequence[Member]) -> bool:
    """Whether the kernel reads these weights: contiguous fp32 or bf16 on a CPU."""
    return all(
        m.weight.dtype in TYPES and m.weight.device.type == "cpu" and m.weight.is_contiguous()
        for m in members
    )


def apply_many(y: Tensor, x: Tensor, table: SlotTable, site: int, pairs: Pairs) -> Tensor:
    """y += LoRA for many rows, where pairs come in runs of one slot (prompts). Writes into y [D, O] and returns it.

    Slots with a DoRA gain are an error: `group_linear` does them.
    """
    shapes = ((pairs.num_src, table.widths[site][0]), (pairs.num_dst, table.widths[site][1]))
    if (tuple(x.shape), tuple(y.shape)) != shapes or x.dtype is not y.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and y {y.dtype} {tuple(y.shape)}; "
            f"site {site} and its pairs want {shapes[0]} and {shapes[1]} of one dtype"
        )
    if isinstance(table, ArenaTable) and not why_not("triton", x.device, x.dtype, False):
        refuse_gains(table, site, pairs)
        return add_triton(y, x, table, site, pairs)
    known = x.dtype in TYPES and x.device.type == "cpu" and y.is_contiguous()
    if kernel().add is None or not known:
        return apply_torch(y, x, table, site, pairs)
    add(y, x if x.is_contiguous() else x.contiguous(), table, site, pairs)
    return y
