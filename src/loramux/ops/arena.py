"""A slot table on a device: the rows of all slots in one arena of bytes there, tables of offsets into it.

Letters: S sites, C slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.ops.slots import PackedRows, SlotTable

ALIGN = 256
COLUMNS = ("a_at", "b_at", "gain_at", "rank", "type", "scale")


def whole(size: int) -> int:
    """What an allocation of `size` bytes takes: nothing is smaller than a unit, so that no two share a start."""
    return max(-(-size // ALIGN), 1) * ALIGN


class Extents:
    """Free room in an arena, first fit; neighbours that are free become one."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.free: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []

    @property
    def free_bytes(self) -> int:
        return sum(size for _, size in self.free)

    def take(self, size: int) -> int | None:
        """Start of `size` bytes, or None where no room is large enough."""
        size = whole(size)
        for number, (start, room) in enumerate(self.free):
            if room >= size:
                self.free[number : number + 1] = (
                    [(start + size, room - size)] if room > size else []
                )
                return start
        return None

    def give(self, start: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for at, room in sorted([*self.free, (start, whole(size))]):
            if merged and merged[-1][0] + merged[-1][1] == at:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((at, room))
        self.free = merged


class ArenaTable(SlotTable):
    """a_at, b_at, gain_at are offsets into `arena`; a content's bytes are copied there and freed with its last slot.

    `tables` mirrors the arrays on the device. Ranks above `max_rank` are refused: buffers are made for it beforehand,
    so that a captured graph stays valid when slots change. A kernel cannot complain: there, an empty slot adds nothing.
    """

    nothing = -1

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        capacity: int,
        arena_bytes: int,
        device: torch.device | str,
        max_rank: int = 256,
    ):
        super().__init__(widths, capacity)
        self.max_rank = max_rank
        self.arena = torch.zeros(-(-arena_bytes // ALIGN) * ALIGN, dtype=torch.uint8, device=device)
        self.extents = Extents(self.arena.shape[0])
        self.placed: dict[
            PackedRows, tuple[int, set[int]]
        ] = {}  # start, and the slots that read it
        self.tables = {name: self._column(name).to(device, copy=True) for name in COLUMNS}

    def put(self, slots: Sequence[int], packed: PackedRows) -> None:
        """Raises ValueError where the rows are malformed or the arena has no room left."""
        super().put(slots, packed)
        self._mirror(slots)

    def clear(self, slots: Sequence[int]) -> None:
        """The arena's room is free at once: work that reads it must have been waited for."""
        self._leave(slots)
        super().clear(slots)
        self._mirror(slots)

    def _admit(self, slots: Sequence[int], packed: PackedRows) -> int:
        rank = int(packed.rank.max(initial=0))
        if rank > self.max_rank:
            raise ValueError(f"rank {rank} is above the table's max_rank {self.max_rank}")
        size = packed.blob.shape[0]
        if packed in self.placed:
            start, owners = self.placed[packed]
            owners.update(slots)
            self._leave([slot for slot in slots if self.held[slot] is not packed])
            return start
        self._leave(slots)
        found = self.extents.take(size)
        if found is None:
            super().clear(slots)
            self._mirror(slots)
            raise ValueError(
                f"the arena has {self.extents.free_bytes} of {self.extents.num_bytes} bytes free and no "
                f"{size} of them in one piece; clear slots first"
            )
        self.arena[found : found + size].copy_(packed.blob)
        self.placed[packed] = (found, set(slots))
        return found

    def _memory(self, packed: PackedRows) -> tuple[Tensor, int]:
        return self.arena, 0

    def _leave(self, slots: Sequence[int]) -> None:
        for slot in slots:
            packed = self.held[slot] if 0 <= slot < self.capacity else None
            if packed is None:
                continue
            start, owners = self.placed[packed]
            owners.discard(slot)
            self.held[slot] = None
            if not owners:
                self.extents.give(start, packed.blob.shape[0])
                del self.placed[packed]

    def _column(self, name: str) -> Tensor:
        return torch.from_numpy(getattr(self, name))

    def _mirror(self, slots: Sequence[int]) -> None:
        index = list(slots)
        for name, table in self.tables.items():
            table[:, index] = self._column(name)[:, index].to(table.device)

    def check_integrity(self) -> None:
        """Every byte is free or of one content, every slot that holds something owns a share of it."""
        used = [(start, packed.blob.shape[0]) for packed, (start, _) in self.placed.items()]
        taken = sum(whole(size) for _, size in used)
        assert taken + self.extents.free_bytes == self.extents.num_bytes, (used, self.extents.free)
        owned = sorted(slot for _, owners in self.placed.values() for slot in owners)
        assert owned == [slot for slot, packed in enumerate(self.held) if packed is not None], owned
