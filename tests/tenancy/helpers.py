"""A clock that tests turn by hand, and the mark of claims about the database that hold on both kinds."""

from __future__ import annotations

import pytest

both = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


class Clock:
    """Call it for the time; add to `now` to let time pass."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
