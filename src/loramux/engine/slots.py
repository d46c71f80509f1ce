"""Which adapter contents sit in which slots: the books of the slot tier.

A content of E experts takes E slots side by side, so that a router's choice is an offset. What is pinned stays where it
is; of the rest, the slots used longest ago are taken. A mix of several contents is pinned whole or not at all. Who
waits for room is not remembered here: that others do not overtake for ever is the scheduler's part.

Letters: C slots, E experts of a content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loramux.ops.pool import PackedRows, SlotTable

PINNED = np.iinfo(np.int64).max


class Slottable(Protocol):
    """What is asked of a content here."""

    @property
    def digest(self) -> str: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def packed(self) -> PackedRows: ...


@dataclass(eq=False)
class Seat:
    """A content in its slots. `used`: when it was last pinned or let go, on the tier's own clock."""

    slots: range
    nbytes: int
    pins: int = 0
    used: int = 0


class SlotTier:
    """Places contents into a `SlotTable`. Not thread-safe: one thread calls, never while a kernel runs."""

    def __init__(self, table: SlotTable, max_slots: int, max_bytes: int):
        if max_slots < 1 or max_slots > table.capacity:
            raise ValueError(
                f"max_slots must be in 1..{table.capacity} (the table's capacity), got {max_slots}"
            )
        self.table = table
        self.max_slots, self.max_bytes = max_slots, max_bytes
        self.seats: dict[str, Seat] = {}
        self.nbytes = 0
        self.evictions = 0
        self._cost_C = np.zeros(max_slots, np.int64)  # 0: free; PINNED; else when it was last used
        self._owner_C: list[str | None] = [None] * max_slots
        self._clock = 0

    # --- What a caller asks ---------------------------------------------------------------------

    def why_never(self, contents: Iterable[Slottable]) -> str | None:
        """Why these contents could not be in slots together even if nothing else was; None if they could."""
        own = {content.digest: content for content in contents}
        slots = sum(content.num_slots for content in own.values())
        nbytes = sum(content.slot_bytes for content in own.values())
        if slots > self.max_slots:
            return f"it needs {slots} adapter slots (one per expert), the engine has {self.max_slots}; raise max_slots"
        if nbytes > self.max_bytes:
            return f"it needs {nbytes:,} bytes in slots, the budget is {self.max_bytes:,}; raise slot_memory"
        return None

    def acquire(self, contents: Sequence[Slottable]) -> list[range] | None:
        """Pin every content (once for each time it is named), placing those that have no slots; None: no room now.

        Raises the table's ValueError where it refuses a content though nothing else is in its way.
        """
        own = {content.digest: content for content in contents}
        plan = self._plan(own)
        if plan is None:
            return None
        if not self._carry_out(plan, own):
            return None
        for content in contents:
            self._pin(content.digest, 1)
        return [self.seats[content.digest].slots for content in contents]

    def release(self, digest: str) -> None:
        """Undo one pin."""
        self._pin(digest, -1)

    def evict(self, digest: str) -> None:
        """Empty the slots of a content that nothing pins; nothing happens if it has none."""
        seat = self.seats.get(digest)
        if seat is None:
            return
        assert seat.pins == 0, f"{digest} is pinned {seat.pins} times"
        self.table.clear(seat.slots)
        del self.seats[digest]
        self.nbytes -= seat.nbytes
        self._cost_C[_as_slice(seat.slots)] = 0
        for slot in seat.slots:
            self._owner_C[slot] = None
        self.evictions += 1

    @property
    def num_pinned(self) -> int:
        return int((self._cost_C == PINNED).sum())

    @property
    def num_used(self) -> int:
        return int((self._cost_C != 0).sum())

    def check_integrity(self) -> None:
        """The books: no slot owned twice, costs say what the seats say, bytes add up, nothing pinned below zero."""
        cost_C = np.zeros_like(self._cost_C)
        for digest, seat in self.seats.items():
            at = _as_slice(seat.slots)
            assert seat.pins >= 0, (digest, seat.pins)
            assert 0 <= seat.slots.start < seat.slots.stop <= self.max_slots, (digest, seat.slots)
            assert not cost_C[at].any(), f"{digest} shares a slot"
            cost_C[at] = PINNED if seat.pins else seat.used
            assert set(self._owner_C[at]) == {digest}, (digest, self._owner_C[at])
        assert sum(owner is not None for owner in self._owner_C) == self.num_used
        assert (cost_C == self._cost_C).all(), (cost_C.tolist(), self._cost_C.tolist())
        assert self.nbytes == sum(seat.nbytes for seat in self.seats.values()), self.nbytes
        assert self.nbytes <= self.max_bytes, (self.nbytes, self.max_bytes)

    # --- Places ---------------------------------------------------------------------------------

    def _plan(self, own: Mapping[str, Slottable]) -> dict[str, range] | None:
        """Where to put those of `own` that have no slots, or have to move; None if that cannot be done now."""
        seated = {digest for digest in own if digest in self.seats}
        missing = [content for digest, content in own.items() if digest not in seated]
        if not missing:
            return {}
        free_to_move = {digest for digest in seated if not self.seats[digest].pins}
        plan = self._windows(missing, seated)
        if plan is None and free_to_move:
            moving = [own[digest] for digest in own if digest in free_to_move]
            plan = self._windows([*missing, *moving], seated - free_to_move)
        return self._afresh(own) if plan is None and not self.num_pinned else plan

    def _afresh(self, own: Mapping[str, Slottable]) -> dict[str, range] | None:
        """Side by side from the first slot on: the places used longest ago may leave no run that is wide enough."""
        ends = list(accumulate(content.num_slots for content in own.values()))
        if ends[-1] > self.max_slots or sum(c.slot_bytes for c in own.values()) > self.max_bytes:
            return None
        return {
            d: range(end - c.num_slots, end) for (d, c), end in zip(own.items(), ends, strict=True)
        }

    def _windows(self, missing: Sequence[Slottable], staying: set[str]) -> dict[str, range] | None:
        """A run of slots for each, the widest first; of all runs without a pin, the one whose newest use is oldest."""
        fixed = sum(s.nbytes for d, s in self.seats.items() if s.pins or d in staying)
        cost_C = self._cost_C.copy()
        for digest in staying:
            cost_C[_as_slice(self.seats[digest].slots)] = PINNED
        if fixed + sum(content.slot_bytes for content in missing) > self.max_bytes:
            return None
        found: dict[str, range] = {}
        for content in sorted(missing, key=lambda c: -c.num_slots):
            window = _best(cost_C, content.num_slots)
            if window is None:
                return None
            cost_C[_as_slice(window)] = PINNED
            found[content.digest] = window
        return found

    def _carry_out(self, plan: Mapping[str, range], own: Mapping[str, Slottable]) -> bool:
        moving = [digest for digest in plan if digest in self.seats]
        inside = [self._owner_C[slot] for window in plan.values() for slot in window]
        for digest in dict.fromkeys([*moving, *inside]):
            if digest is not None:
                self.evict(digest)
        wanted = sum(own[digest].slot_bytes for digest in plan)
        if self.nbytes + wanted > self.max_bytes:
            for digest in self._idle(own):
                self.evict(digest)
                if self.nbytes + wanted <= self.max_bytes:
                    break
        return all(self._put(own[digest], window, own) for digest, window in plan.items())

    def _put(self, content: Slottable, window: range, own: Mapping[str, Slottable]) -> bool:
        """Fill the slots. A table with an arena may lack room in one piece: then more has to go, the oldest first."""
        if not self._try(content, window):
            for digest in self._idle(own):
                self.evict(digest)
                if self._try(content, window):
                    break
            else:
                if self.num_pinned:
                    return False
                self.table.put(window, content.packed)  # raises what is wrong with it
        self.nbytes += content.slot_bytes
        self.seats[content.digest] = Seat(window, content.slot_bytes)
        for slot in window:
            self._owner_C[slot] = content.digest
        self._pin(content.digest, 0)
        return True

    def _try(self, content: Slottable, window: range) -> bool:
        try:
            self.table.put(window, content.packed)
        except ValueError:
            return False
        return True

    def _idle(self, own: Mapping[str, Slottable]) -> list[str]:
        """What may go, the longest unused first."""
        idle = [d for d, seat in self.seats.items() if not seat.pins and d not in own]
        return sorted(idle, key=lambda digest: self.seats[digest].used)

    def _pin(self, digest: str, change: int) -> None:
        seat = self.seats[digest]
        assert seat.pins + change >= 0, f"{digest} was released more often than acquired"
        self._clock += 1
        seat.pins += change
        seat.used = self._clock
        self._cost_C[_as_slice(seat.slots)] = PINNED if seat.pins else seat.used


def _best(cost_C: NDArray[np.int64], width: int) -> range | None:
    """The run whose highest cost is lowest. Singles fill up from below, wide runs from above: free runs stay whole."""
    if width > len(cost_C):
        return None
    worst = np.lib.stride_tricks.sliding_window_view(cost_C, width).max(axis=1)
    start = int(worst.argmin()) if width == 1 else len(worst) - 1 - int(worst[::-1].argmin())
    return None if worst[start] == PINNED else range(start, start + width)


def _as_slice(slots: range) -> slice:
    return slice(slots.start, slots.stop)
