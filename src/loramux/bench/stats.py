"""Paired rounds to a ratio with an interval, and what such an interval supports.

Why order statistics: the 95 % interval of a median is given by two of the sorted ratios, chosen so that a fair coin
thrown once per round says so (binomial). It assumes nothing about the noise, needs no random numbers, and one round
that another process disturbed moves neither the median nor the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A median and the interval that holds it with at least 95 % confidence; (min, max) below six values."""

    value: float
    low: float
    high: float

    def overlaps(self, low: float, high: float) -> bool:
        return self.low <= high and low <= self.high


def ranks_of_interval(count: int, level: float = LEVEL) -> tuple[int, int]:
    """0-based positions among `count` sorted values whose interval holds the true median with at least `level`.

    The largest j with P(Binomial(count, 1/2) < j) <= (1 - level) / 2, counted from both ends.
    """
    if count < 1:
        raise ValueError("an interval needs at least one value")
    tail, j = 0.0, 0
    while (tail := tail + math.comb(count, j) / 2**count) <= (1 - level) / 2:
        j += 1
    low = max(j - 1, 0)
    return low, count - 1 - low


def median_interval(values: Sequence[float]) -> Interval:
    """Median with its 95 % interval."""
    low, high = ranks_of_interval(len(values))
    ordered = sorted(values)
    return Interval(median(ordered), ordered[low], ordered[high])


def paired_ratio(variant: Sequence[float], reference: Sequence[float]) -> Interval:
    """Median over rounds of variant[i] / reference[i]."""
    if len(variant) != len(reference):
        raise ValueError(
            f"paired rounds need one time of each, got {len(variant)} and {len(reference)}"
        )
    return median_interval([a / b for a, b in zip(variant, reference, strict=True)])


def is_resolved(ratio: Interval, control: Interval | None) -> bool:
    """Whether the ratio differs from 1 by more than two copies of the reference differ from each other."""
    spread = 0.0
    if control is not None:
        spread = max(abs(control.low - 1), abs(control.high - 1))
    return not ratio.overlaps(1 - spread, 1 + spread)


def verdict(found: Interval, target: float | None) -> str:
    """Against `at most target`: "met" or "missed" if the whole interval is, "open" otherwise, "" without a target."""
    if target is None:
        return ""
    if found.high <= target:
        return "met"
    return "missed" if found.low > target else "open"
