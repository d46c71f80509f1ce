"""What rows of results support: means, spreads, and intervals of a difference by paired bootstrap.

Paired: both methods answered the same test rows with the same seeds. Of each test row the difference of the two
scores is taken and averaged over the seeds; those differences are resampled with replacement within their task, and
the mean over tasks of the resampled means is what the interval is of. It therefore covers the choice of test rows
and not that of seeds, whose spread is given beside it: three seeds are too few to resample.

Letters: T tasks, S seeds, N test rows of a task, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
Scores = Mapping[str, Sequence[float]]
"""Task -> score of each test row."""


@dataclass(frozen=True)
class Difference:
    """Mean difference with its interval. above: share of resamples above 0; wins: seeds in which it is above 0."""

    value: float
    low: float
    high: float
    above: float
    wins: int
    seeds: int

    @property
    def says(self) -> str:
        """What the interval supports."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "not separated"


def mean_over_tasks(scores: Scores) -> float:
    """Mean of the tasks' means: a task with more rows does not count more."""
    return float(np.mean([np.mean(rows) for rows in scores.values()]))


def row_error(scores: Sequence[Scores]) -> float | None:
    """Standard error, over test rows, of the mean over tasks; rows are averaged over the seeds first."""
    variances = []
    for task in scores[0]:
        mean_N = np.mean([seed[task] for seed in scores], axis=0)
        if len(mean_N) < 2:
            return None
        variances.append(float(np.var(mean_N, ddof=1)) / len(mean_N))
    return sqrt(sum(variances)) / len(variances)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_bootstrap(
    ours: Mapping[int, Scores],
    theirs: Mapping[int, Scores],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference | None:
    """`ours` minus `theirs`, each {seed: {task: row scores}}, over the seeds and tasks of both; None without any."""
    seeds = [s for s in ours if s in theirs]
    if not seeds:
        return None
    tasks = [t for t in ours[seeds[0]] if all(t in m[s] for m in (ours, theirs) for s in seeds)]
    if not tasks:
        return None
    by_seed = [
        {t: np.subtract(_rows(ours, s, t), _rows(theirs, s, t, len(ours[s][t]))) for t in tasks}
        for s in seeds
    ]
    drawn_B = np.zeros(resamples)
    rng = np.random.default_rng(seed)
    for task in tasks:
        difference_N = np.mean([one[task] for one in by_seed], axis=0)
        drawn_B += _resampled_means(difference_N, resamples, rng) / len(tasks)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn_B, [tail, 100 - tail])
    values = [float(np.mean([one[task].mean() for task in tasks])) for one in by_seed]
    return Difference(
        value=float(np.mean(values)),
        low=float(low),
        high=float(high),
        above=float(np.mean(drawn_B > 0)),
        wins=sum(value > 0 for value in values),
        seeds=len(seeds),
    )


def _rows(
    scores: Mapping[int, Scores], seed: int, task: str, want: int | None = None
) -> Sequence[float]:
    rows = scores[seed][task]
    if want is not None and len(rows) != want:
        raise ValueError(
            f"task {task!r}: {want} test rows against {len(rows)}; a pair needs the same rows"
        )
    return rows


def _resampled_means(
    value_N: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means [B] of resamples with replacement. Equal values are drawn together: a difference takes few values."""
    levels, counts = np.unique(value_N, return_counts=True)
    drawn = rng.multinomial(len(value_N), counts / len(value_N), size=resamples)
    means: NDArray[np.float64] = drawn @ levels / len(value_N)
    return means
