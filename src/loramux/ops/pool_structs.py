"""What pool.c is told: ctypes structs that point into tensors and slot tables.

Letters: S sites, C slots.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loramux.ops.contract import Pairs, RowMap
from loramux.ops.cpu_structs import TYPES, pairs_address, rows_address
from loramux.ops.gate_structs import late_address
from loramux.ops.gates import LateCall
from loramux.ops.pool_kernel import GAIN_AT_EXIT, check, kernel
from loramux.ops.slots import SlotTable


class Linear(Protocol):
    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def site(self) -> int | None: ...


class SlotsStruct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "gain", "rank", "type", "scale")]


class MemberStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "bias", "pairs")),
        ("slots", SlotsStruct),
        ("d_out", ctypes.c_int64),
    ]


class GroupStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("members", "enter", "exit", "late", "ys")),
        *((name, ctypes.c_int64) for name in ("num_members", "d_in", "capacity")),
        ("type", ctypes.c_int32),
    ]


class AddStruct(ctypes.Structure):
    _fields_ = [
        ("slots", SlotsStruct),
        ("pairs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "capacity")),
        ("type", ctypes.c_int32),
    ]


def slots_of(table: SlotTable, site: int) -> SlotsStruct:
    """The table's row of one site."""
    columns = (table.a_at, table.b_at, table.gain_at, table.rank, table.type, table.scale)
    return SlotsStruct(*(column.ctypes.data + column.strides[0] * site for column in columns))


class BoundGroup:
    """The filled structs of one group call, and everything they point into. `in_torch`: where the kernel cannot."""

    def __init__(
        self,
        members: Sequence[Linear],
        table: SlotTable | None,
        pairs: Sequence[Pairs | None],
        enter: RowMap | None,
        exit: RowMap | None,
        gate: LateCall | None,
        in_torch: Callable[[Tensor], list[Tensor]],
    ):
        self.in_torch = in_torch
        first = members[0].weight
        self.dtype, self.d_in = first.dtype, int(first.shape[1])
        self.d_outs = [int(member.weight.shape[0]) for member in members]
        self.enter, self.exit = enter, exit
        self.structs = (MemberStruct * len(members))()
        for struct, member, member_pairs in zip(self.structs, members, pairs, strict=True):
            self._fill(struct, member, table, member_pairs)
        self.ys = (ctypes.c_int64 * len(members))()
        self.shape, self.num_rows = torch.Size(()), 0
        self.shapes: list[tuple[int, ...]] = []
        self.group = GroupStruct(
            ys=ctypes.addressof(self.ys),
            members=ctypes.addressof(self.structs),
            enter=None if enter is None else rows_address(enter),
            exit=None if exit is None else rows_address(exit),
            late=None if gate is None else late_address(gate, pairs[0]),
            num_members=len(members),
            d_in=self.d_in,
            capacity=0 if table is None else table.capacity,
            type=TYPES[self.dtype],
        )
        self.address = ctypes.addressof(self.group)
        call = kernel().group
        assert call is not None
        self.call = call
        self.keep = (list(members), table, list(pairs), gate)

    def _fill(
        self, struct: MemberStruct, member: Linear, table: SlotTable | None, pairs: Pairs | None
    ) -> None:
        weight, bias = member.weight, member.bias
        _check_weight(weight, self.dtype, self.d_in)
        struct.w, struct.d_out = weight.data_ptr(), weight.shape[0]
        if bias is not None:
            if bias.dtype is not weight.dtype or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"bias is {bias.dtype} {tuple(bias.shape)}, the weight {weight.dtype} {tuple(weight.shape)}"
                )
            struct.bias = bias.data_ptr()
        if pairs is None or member.site is None:
            return
        if table is None:
            raise ValueError("pairs name slots: give the slot table")
        if table.widths[member.site] != (self.d_in, weight.shape[0]):
            raise ValueError(
                f"site {member.site} is {table.widths[member.site]} wide in the table, its weight is "
                f"{(self.d_in, weight.shape[0])}"
            )
        struct.slots = slots_of(table, member.site)
        struct.pairs = pairs_address(pairs)

    def _look_at(self, shape: torch.Size) -> None:
        """Outputs keep the leading shape of x, or hold other rows inside or behind an FFN."""
        if not shape or shape[-1] != self.d_in:
            raise ValueError(f"x is {tuple(shape)}, the weights are [out, {self.d_in}]")
        lead = tuple(shape[:-1])
        if self.enter is not None or self.exit is not None:
            rows = self.enter.num_rows if self.enter is not None else self.exit.num_tokens  # type: ignore[union-attr]
            lead = (*(1 for _ in shape[:-2]), rows)
        self.shape, self.num_rows = shape, math.prod(shape[:-1])
        self.shapes = [(*lead, d_out) for d_out in self.d_outs]

    def run(self, x: Tensor) -> list[Tensor]:
        if x.shape != self.shape:
            self._look_at(x.shape)
        if x.dtype is not self.dtype:
            raise ValueError(f"x is {x.dtype}, the weights are {self.dtype}")
        if x.requires_grad:
            raise ValueError("the pool kernel has no gradient; use torch.no_grad()")
        if not x.is_contiguous():
            x = x.contiguous()
        out = []
        for place, shape in enumerate(self.shapes):
            y = x.new_empty(*shape)
            self.ys[place] = y.data_ptr()
            out.append(y)
        error = self.call(self.address, x.data_ptr(), self.num_rows, torch.get_num_threads())
        if error:
            if error == GAIN_AT_EXIT:
                return self.in_torch(x)
            check(error)
        return out


def add(y: Tensor, x: Tensor, table: SlotTable, site: int, pairs: Pairs) -> None:
    """y += LoRA. Contiguous, of one dtype that the kernel knows."""
    d_in, d_out = table.widths[site]
    struct = AddStruct(
        slots_of(table, site), pairs_address(pairs), d_in, d_out, table.capacity, TYPES[x.dtype]
    )
    call = kernel().add
    assert call is not None
    check(call(ctypes.addressof(struct), x.data_ptr(), y.data_ptr(), torch.get_num_threads()))


def _check_weight(weight: Tensor, dtype: torch.dtype, d_in: int) -> None:
    given = f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}"
    if weight.dtype is not dtype or weight.dim() != 2 or weight.shape[1] != d_in:
        raise ValueError(f"{given}; the linears of a group are all {dtype} [out, {d_in}]")
    if weight.device.type != "cpu" or not weight.is_contiguous():
        raise ValueError(f"{given}; the kernel reads contiguous weights on cpu")
