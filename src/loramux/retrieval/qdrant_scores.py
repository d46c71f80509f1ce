"""What is made of the scores that the database gives: the best candidates, and what scores are standardised with.

Why moments of their own: of many candidates only the best come back, and their mean says nothing of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import TypeAlias

import numpy as np

from loramux.retrieval.index import Moments, Scored
from loramux.retrieval.rank import MIN_FOR_Z, hybrid, moments_of
from loramux.retrieval.text import Floats

Scores: TypeAlias = Mapping[str, float]  # by point, best first
Both: TypeAlias = tuple[Scores, Scores | None]  # by words, by meaning


def in_both(scores: Both) -> list[str]:
    """Points that both halves know."""
    return [point for point in scores[0] if scores[1] is not None and point in scores[1]]


def best_of(scores: Both, points: Sequence[str], num: int) -> list[str]:
    """`num` by words, as many by meaning and, of these points, as many by both together."""
    found = Scored(points, [], np.arange(len(points)), *columns(scores, points))
    order = np.argsort(-hybrid(found), kind="stable")[:num].tolist()
    halves = (islice(half or (), num) for half in scores)
    return list(dict.fromkeys(chain(*halves, (points[i] for i in order))))


def columns(scores: Both, points: Sequence[str]) -> tuple[Floats, Floats | None]:
    """Both scores of these points."""
    lexical = np.array([scores[0].get(point, 0.0) for point in points], np.float32)
    if scores[1] is None:
        return lexical, None
    return lexical, np.array([scores[1].get(point, np.nan) for point in points], np.float32)


def moments_over(
    scores: Both, points: Sequence[str], best: Both = ({}, {}), num: int = 0
) -> tuple[Moments, Moments] | None:
    """Mean and deviation of both halves over these points, or over `num` candidates of which these are a sample.

    best: those of all candidates whose scores are known besides. A few scores far above the others make most of a
    deviation, so a sample alone would be far off: it stands only for what is not among the best.
    """
    if len(points) < MIN_FOR_Z:
        return None
    lexical, dense = (
        _moments(column, half or {}, points, num)
        for column, half in zip(columns(scores, points), best, strict=True)
    )
    return lexical, dense


def _moments(column: Floats | None, best: Scores, points: Sequence[str], num: int) -> Moments:
    if column is None:
        return 0.0, 0.0
    others = column[[point not in best for point in points]] if best else column
    there = others[~np.isnan(others)].astype(np.float64)
    known = np.array(list(best.values()), np.float64)
    if len(there) == 0:
        return moments_of(known.astype(np.float32))
    # How many candidates each of the sample stands for.
    weight = (num - len(known)) / len(others) if best else 1.0
    total = len(known) + weight * len(there)
    mean = (known.sum() + weight * there.sum()) / total
    square = (np.square(known - mean).sum() + weight * np.square(there - mean).sum()) / total
    return float(mean), float(np.sqrt(square))
