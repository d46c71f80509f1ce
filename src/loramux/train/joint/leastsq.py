"""Least squares with coefficients that may not be negative, for a handful of columns.

Why not an iteration: with so few columns every subset can be tried. The optimum is the plain least-squares solution
of the columns that it uses, so the best subset whose solution has no negative coefficient is it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

MAX_COLUMNS = 8
TOLERANCE = 1e-22  # of squared errors, relative: about rounding; fewer columns win among equals


def nonnegative_fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The coefficients c >= 0 with the smallest sum of (rows @ c - values) ** 2; unused columns get 0."""
    matrix, target = np.asarray(rows, dtype=np.float64), np.asarray(values, dtype=np.float64)
    count, width = matrix.shape
    assert width <= MAX_COLUMNS, f"{width} columns are too many to try every subset"
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    best, coefficients = float((target**2).sum()), np.zeros(width)
    slack = TOLERANCE * best
    for size in range(1, min(width, count) + 1):
        for chosen in combinations(range(width), size):
            own = matrix[:, chosen] / scale[list(chosen)]
            found, _, rank, _ = np.linalg.lstsq(own, target, rcond=None)
            if rank < size or (found < 0).any():
                continue
            error = float(((own @ found - target) ** 2).sum())
            if error < best - slack:
                best, coefficients = error, np.zeros(width)
                coefficients[list(chosen)] = found / scale[list(chosen)]
    return [float(value) for value in coefficients]
