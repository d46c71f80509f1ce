"""Which rows every slot holds at every site: tables of addresses that kernels read, and the rows of one adapter packed.

Why addresses: a slot is filled by writing some 200 numbers. Rows stay where they were read to; nothing is copied on a
CPU. On other devices the same tables hold byte offsets into one arena there.

Letters: S sites of the engine, E experts of one adapter content, C slots, r rank, I input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.ops.cpu_structs import TYPES

Rows = tuple[Tensor, Tensor, Tensor | None, float]
DTYPES = {number: dtype for dtype, number in TYPES.items()}
EMPTY = -1  # rank of a slot that holds nothing: a pair that names it is an error


@dataclass(frozen=True, eq=False)
class PackedRows:
    """All rows of one adapter content in one blob of bytes; arrays are [E, S], experts by the engine's sites.

    a_at, b_at: byte offset of the first row of A [r, I] and of B [r, O], rows contiguous, of `dtype` (fp32 or bf16).
    rank 0: the adapter does not touch the site. gain_at: byte offset of DoRA's gain c, fp32 [O], or -1; None: no DoRA.
    """

    blob: Tensor
    dtype: torch.dtype
    a_at: NDArray[np.int64]
    b_at: NDArray[np.int64]
    rank: NDArray[np.int32]
    scale: NDArray[np.float32]
    gain_at: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name, dtype in _COLUMNS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.ascontiguousarray(value, dtype=dtype))
        shapes = {name: getattr(self, name).shape for name in _COLUMNS if name != "gain_at"}
        if self.gain_at is not None:
            shapes["gain_at"] = self.gain_at.shape
        if len(set(shapes.values())) != 1 or self.rank.ndim != 2:
            raise ValueError(f"the arrays must all be [experts, sites], got {shapes}")
        if self.blob.dtype is not torch.uint8 or self.blob.dim() != 1 or self.blob.stride(0) != 1:
            raise ValueError(
                f"blob must be contiguous bytes (1-D uint8), got {self.blob.dtype} {tuple(self.blob.shape)}"
            )
        if self.dtype not in TYPES:
            raise ValueError(
                f"rows are {self.dtype}; convert them to one of {sorted(map(str, TYPES))}"
            )

    @property
    def num_experts(self) -> int:
        return int(self.rank.shape[0])

    @property
    def num_sites(self) -> int:
        return int(self.rank.shape[1])


_COLUMNS = {
    "a_at": np.int64,
    "b_at": np.int64,
    "rank": np.int32,
    "scale": np.float32,
    "gain_at": np.int64,
}


class SlotTable:
    """Fixed capacity; slot ids are the same at every site. `widths`: (d_in, d_out) of each, in the engine's order.

    Arrays are [S, C]. a_at, b_at and gain_at are addresses (`nothing` where there is no such row), and `put` keeps the
    blob alive until `clear` or the next `put`. Nothing here locks: a slot must not change while a call reads it.
    """

    nothing = 0

    def __init__(self, widths: Sequence[tuple[int, int]], capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 slot, got {capacity}")
        self.widths = tuple((int(d_in), int(d_out)) for d_in, d_out in widths)
        self.capacity = capacity
        shape = (len(self.widths), capacity)
        self.a_at = np.full(shape, self.nothing, np.int64)
        self.b_at = np.full(shape, self.nothing, np.int64)
        self.gain_at = np.full(shape, self.nothing, np.int64)
        self.rank = np.full(shape, EMPTY, np.int32)
        self.scale = np.zeros(shape, np.float32)
        self.type = np.zeros(shape, np.int32)
        self.held: list[PackedRows | None] = [None] * capacity
        self._d_in = np.array([w[0] for w in self.widths], np.int64)
        self._d_out = np.array([w[1] for w in self.widths], np.int64)

    @property
    def num_sites(self) -> int:
        return len(self.widths)

    def put(self, slots: Sequence[int], packed: PackedRows) -> None:
        """Expert e of `packed` goes into slots[e]. Raises ValueError where rows would lie outside the blob."""
        index = self._index(slots)
        if packed.rank.shape != (len(slots), self.num_sites):
            raise ValueError(
                f"{len(slots)} slots of {self.num_sites} sites were asked for, the rows are of "
                f"{packed.num_experts} experts and {packed.num_sites} sites"
            )
        self._check(packed)
        base = self._admit(slots, packed)
        acts = packed.rank > 0
        self.a_at[:, index] = np.where(acts, base + packed.a_at, self.nothing).T
        self.b_at[:, index] = np.where(acts, base + packed.b_at, self.nothing).T
        self.rank[:, index] = packed.rank.T
        self.scale[:, index] = packed.scale.T
        self.type[:, index] = TYPES[packed.dtype]
        self.gain_at[:, index] = self.nothing
        if packed.gain_at is not None:
            gained = packed.gain_at >= 0
            self.gain_at[:, index] = np.where(gained, base + packed.gain_at, self.nothing).T
        for slot in slots:
            self.held[slot] = packed

    def clear(self, slots: Sequence[int]) -> None:
        """From now on a pair that names one of them is an error."""
        index = self._index(slots)
        self.rank[:, index] = EMPTY
        for column in (self.a_at, self.b_at, self.gain_at):
            column[:, index] = self.nothing
        for slot in slots:
            self.held[slot] = None

    def rows_of(self, slot: int, site: int) -> Rows:
        """(A [r, I], B [r, O], gain [O] or None, scale): views of what the slot reads."""
        packed = self.held[slot] if 0 <= slot < self.capacity else None
        if packed is None:
            raise ValueError(f"slot {slot} holds no adapter (capacity {self.capacity})")
        memory, base = self._memory(packed)
        rank, (d_in, d_out) = int(self.rank[site, slot]), self.widths[site]

        def view(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            count = math.prod(shape) * dtype.itemsize
            start = int(address) - base if count else 0
            return memory[start : start + count].view(dtype).view(shape)

        a = view(self.a_at[site, slot], (rank, d_in), packed.dtype)
        b = view(self.b_at[site, slot], (rank, d_out), packed.dtype)
        at = self.gain_at[site, slot]
        gain = None if at == self.nothing else view(at, (d_out,), torch.float32)
        return a, b, gain, float(self.scale[site, slot])

    def _admit(self, slots: Sequence[int], packed: PackedRows) -> int:
        """What the blob's offsets are counted from."""
        return packed.blob.data_ptr()

    def _memory(self, packed: PackedRows) -> tuple[Tensor, int]:
        """Where the rows of a content that was put lie, and what its addresses are counted from."""
        return packed.blob, packed.blob.data_ptr()

    def _index(self, slots: Sequence[int]) -> NDArray[np.int64]:
        if not all(0 <= slot < self.capacity for slot in slots) or len(set(slots)) != len(slots):
            raise ValueError(f"slots must be different ones of 0..{self.capacity - 1}, got {slots}")
        return np.array(slots, np.int64)

    def _check(self, packed: PackedRows) -> None:
        size, item = packed.blob.shape[0], packed.dtype.itemsize
        if packed.blob.device.type != "cpu":
            raise ValueError(f"the blob must be on cpu, it is on {packed.blob.device}")
        if (packed.rank < 0).any():
            raise ValueError("a rank is negative")
        acts = packed.rank > 0
        parts = [
            ("A", packed.a_at, packed.rank * self._d_in * item, item, acts),
            ("B", packed.b_at, packed.rank * self._d_out * item, item, acts),
        ]
        if packed.gain_at is not None:
            gains = packed.gain_at >= 0
            parts.append(
                ("gain", packed.gain_at, np.broadcast_to(4 * self._d_out, gains.shape), 4, gains)
            )
        for name, start, length, align, used in parts:
            bad = used & ((start < 0) | (start + length > size) | (start % align != 0))
            if bad.any():
                expert, site = (int(i) for i in np.argwhere(bad)[0])
                raise ValueError(
                    f"{name} of expert {expert} at site {site} is {length[expert, site]} bytes from "
                    f"{start[expert, site]}; it must start at a multiple of {align} and end within the blob's {size}"
                )
