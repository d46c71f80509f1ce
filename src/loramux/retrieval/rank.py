"""From two scores per candidate to the k that are returned.

Hybrid: each score is standardised over the candidates of this query, then they are added. With few candidates mean and
deviation say little and the cosines themselves are added. Dots and ties: equal scores are ordered by id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.index import Moments, Scored
from loramux.retrieval.text import Floats

MIN_FOR_Z = 50
NEAR_COPY = 0.98
_FIRST_LOOK = 64


@dataclass(frozen=True)
class Ranking:
    """How candidates are ranked and chosen.

    dense_weight: share of the dense half. per_owner: at most so many hits of one contributor. max_nearness: a candidate
    whose cosine to a chosen one is above it is passed over as a near copy. None turns either off.
    """

    dense_weight: float = 0.5
    per_owner: int | None = None
    max_nearness: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_weight <= 1.0:
            raise RetrievalError(f"dense_weight must lie in [0, 1], got {self.dense_weight}")
        if self.per_owner is not None and self.per_owner < 1:
            raise RetrievalError(f"per_owner must be at least 1 or None, got {self.per_owner}")
        if self.max_nearness is not None and not -1.0 <= self.max_nearness <= 1.0:
            raise RetrievalError(f"max_nearness is a cosine in [-1, 1], got {self.max_nearness}")


def hybrid(scored: Scored, dense_weight: float = 0.5) -> Floats:
    """One score per candidate; an adapter without a dense vector is judged by its words alone."""
    if scored.dense is None or dense_weight == 0.0:
        return scored.lexical
    lexical, dense = scored.lexical, scored.dense
    if scored.moments is not None:
        lexical, dense = map(standardised, (lexical, dense), scored.moments)
    elif len(scored) >= MIN_FOR_Z:
        lexical, dense = standardised(lexical), standardised(dense)
    dense = np.where(np.isnan(dense), lexical, dense)
    return ((1.0 - dense_weight) * lexical + dense_weight * dense).astype(np.float32)


def standardised(values: Floats, moments: Moments | None = None) -> Floats:
    """Mean 0 and deviation 1 over what is there, or with given moments; all 0 where everything is equal."""
    mean, spread = moments_of(values) if moments is None else moments
    centred = values - np.float32(mean)
    return centred / np.float32(spread) if spread > 1e-12 else 0 * centred


def moments_of(values: Floats) -> Moments:
    """Mean and deviation of what is there."""
    there = values[~np.isnan(values)]
    if len(there) == 0:
        return 0.0, 0.0
    return float(there.mean(dtype=np.float64)), float(there.std(dtype=np.float64))


def choose(
    scored: Scored,
    scores: Floats,
    k: int,
    ranking: Ranking,
    nearness: Callable[[Sequence[str]], Floats],
) -> list[int]:
    """Positions of the k hits, best first; fewer where the options leave no more."""
    if ranking.per_owner is None and ranking.max_nearness is None:
        return top(scored, scores, k)
    look = min(len(scored), max(_FIRST_LOOK, 8 * k))
    while True:
        order = top(scored, scores, look)
        found = _varied(scored, order, k, ranking, nearness)
        if len(found) == k or look == len(scored):
            return found
        look = min(len(scored), 4 * look)


def top(scored: Scored, scores: Floats, k: int) -> list[int]:
    """Positions of the k best, by score and then by id."""
    k = min(k, len(scores))
    if k == 0:
        return []
    # All that tie with the k-th are looked at, or which of them is returned would depend on the order of rows.
    limit = np.partition(scores, len(scores) - k)[len(scores) - k]
    close = np.flatnonzero(scores >= limit).tolist()
    return sorted(close, key=lambda i: (-float(scores[i]), scored.id(i)))[:k]


def _varied(
    scored: Scored,
    order: list[int],
    k: int,
    ranking: Ranking,
    nearness: Callable[[Sequence[str]], Floats],
) -> list[int]:
    near, limit = None, ranking.max_nearness
    if limit is not None:
        near = nearness([scored.id(i) for i in order])
    by_owner: dict[str, int] = {}
    chosen: list[int] = []
    for place, i in enumerate(order):
        owner = scored.owner(i)
        if ranking.per_owner is not None and by_owner.get(owner, 0) >= ranking.per_owner:
            continue
        if near is not None and limit is not None and (near[place, chosen] > limit).any():
            continue
        chosen.append(place)
        by_owner[owner] = by_owner.get(owner, 0) + 1
        if len(chosen) == k:
            break
    return [order[place] for place in chosen]
