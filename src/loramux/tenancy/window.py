"""`Window`: how much was spent in the last minute, reserve first, settle later.

Why not a token bucket: one that starts full lets twice its limit through in its first minute, and a fixed window does
so at its edge. Here every amount counts for 60 seconds from its start, in slots of one second, and what is reserved
counts for as long as it is not settled: what starts within any 60 seconds never adds up to more than the limit.

Not locked: its owner is. Times are seconds of a monotonic clock, so that turning the clock gives nothing.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 60


class Window:
    """Spent amounts by the second they started in, and the sum of what is reserved."""

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # [second, amount], oldest first
        self._spent = 0
        self.reserved = 0

    def used(self, now: float) -> int:
        self._expire(now)
        return self._spent + self.reserved

    def fits(self, amount: int, limit: int | None, now: float) -> bool:
        return limit is None or self.used(now) + amount <= limit

    def reserve(self, amount: int) -> None:
        self.reserved += amount

    def settle(self, reserved: int, used: int, started: float, now: float) -> None:
        """`used` of `reserved` were spent; the rest is free again."""
        self.reserved -= reserved
        assert self.reserved >= 0, "more was settled than reserved"
        self._expire(now)
        if used and not _is_over(math.floor(started), now):
            self._add(math.floor(started), used)

    def wait_s(self, amount: int, limit: int, now: float) -> float | None:
        """Seconds until `amount` would fit if nothing else came; None if only settling can make room."""
        missing = self.used(now) + amount - limit
        if missing <= 0:
            return 0.0
        for second, spent in self._slots:
            missing -= spent
            if missing <= 0:
                return second + 1 + WINDOW_S - now
        return None

    def reset_s(self, now: float) -> float:
        """Seconds until nothing of what is spent counts any more."""
        self._expire(now)
        return self._slots[-1][0] + 1 + WINDOW_S - now if self._slots else 0.0

    def is_idle(self, now: float) -> bool:
        return not self.used(now)

    def _add(self, second: int, amount: int) -> None:
        at = len(self._slots)
        while at and self._slots[at - 1][0] > second:
            at -= 1
        if at and self._slots[at - 1][0] == second:
            self._slots[at - 1][1] += amount
        else:
            self._slots.insert(at, [second, amount])
        self._spent += amount

    def _expire(self, now: float) -> None:
        while self._slots and _is_over(self._slots[0][0], now):
            self._spent -= self._slots.popleft()[1]

    def check_integrity(self) -> None:
        assert self._spent == sum(amount for _, amount in self._slots), "the sum of the slots"
        assert self.reserved >= 0, "negative reservations"
        seconds = [second for second, _ in self._slots]
        assert seconds == sorted(set(seconds)), "slots out of order"
        assert len(self._slots) <= WINDOW_S + 1, "slots that are over"


def _is_over(second: int, now: float) -> bool:
    """Whole slots: an amount counts a little longer than a minute, never shorter."""
    return now >= second + 1 + WINDOW_S
