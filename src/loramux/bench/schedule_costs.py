"""What a call of a recorded joint run costs, as a function of what it holds: fitted to the run's own trace.

seconds(call) = fixed + per_job * jobs + per_token * tokens + per_square * sum(rows * length ** 2), nothing negative; a
step costs `per_step` more outside of calls (optimizer, collating, bookkeeping). Errors are relative, so short calls
count as much as long ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from loramux.errors import LoramuxError

Shape = tuple[int, int]  # rows, length
MIN_CALLS = 8


@dataclass(frozen=True)
class CallCosts:
    """Seconds; error: median relative error over the calls it was fitted to."""

    fixed: float
    per_job: float
    per_token: float
    per_square: float
    per_step: float
    error: float = 0.0
    calls: int = 0

    def call(self, shapes: Sequence[Shape]) -> float:
        tokens = sum(rows * length for rows, length in shapes)
        squares = sum(rows * length**2 for rows, length in shapes)
        by_jobs = self.fixed + self.per_job * len(shapes)
        return by_jobs + self.per_token * tokens + self.per_square * squares

    def knee(self, share: float = 0.1) -> int:
        """Tokens at which the fixed cost is this share of a call: beyond it fuller calls gain little."""
        return round(self.fixed * (1 - share) / share / self.per_token) if self.per_token else 0


def fit_costs(rows: Iterable[Mapping[str, Any]], clock: str = "cpu") -> CallCosts:
    """clock: "cpu" (of the process) or "seconds" (by the wall)."""
    from loramux.train.joint.leastsq import nonnegative_fit

    design: list[list[float]] = []
    spent: list[float] = []
    outside: list[float] = []
    for row in rows:
        if row["what"] != "round":
            continue
        for call in row["calls"]:
            shapes = [(b, t) for _, b, t in call["parts"]]
            tokens = float(sum(b * t for b, t in shapes))
            squares = float(sum(b * t * t for b, t in shapes))
            design.append([1.0, float(len(shapes)), tokens, squares])
            spent.append(max(call[clock], 1e-9))
        inside = sum(call[clock] for call in row["calls"])
        if row["picked"]:
            outside.append(max(row[clock] - inside, 0.0) / len(row["picked"]))
    if len(spent) < MIN_CALLS:
        raise LoramuxError(
            f"a trace needs at least {MIN_CALLS} model calls to fit costs to, this one has {len(spent)}; "
            "record a longer run"
        )
    relative = [[value / own for value in line] for line, own in zip(design, spent, strict=True)]
    found = nonnegative_fit(relative, [1.0] * len(spent))
    errors = [
        abs(sum(c * value for c, value in zip(found, line, strict=True)) - 1) for line in relative
    ]
    fixed, per_job, per_token, per_square = found
    return CallCosts(
        fixed, per_job, per_token, per_square, median(outside), median(errors), len(spent)
    )
