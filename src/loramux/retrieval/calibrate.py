"""From held-out prompts to a threshold below which retrieval should rather find nothing.

Why on the lexical score: for "is any adapter of this kind in the pool?" it separates far better than the dense cosine.
The value depends on the pool and on how its users write, so there is no default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loramux.retrieval.errors import RetrievalError


@dataclass(frozen=True)
class Threshold:
    """min_score for a Retriever, and what it does to the prompts it was chosen on.

    auc: how often a prompt that belongs scores above one that does not. kept: share of prompts that belong which pass.
    refused: share of the others which are stopped; None where none were given.
    """

    min_score: float
    kept: float
    refused: float | None
    auc: float | None


def abstain_threshold(
    inside: Sequence[float], outside: Sequence[float] | None = None, keep: float = 0.95
) -> Threshold:
    """Choose from best lexical scores of prompts whose adapter is in the pool and of prompts without one.

    With both: the threshold with the largest sum of the shares that are treated rightly. Without `outside`: the one
    that keeps the share `keep` of the inside.
    """
    good = _scores(inside, "inside")
    if not 0.0 < keep <= 1.0:
        raise RetrievalError(f"keep must lie above 0 and not above 1, got {keep}")
    if outside is None:
        limit = float(np.quantile(good, 1.0 - keep, method="lower"))
        return Threshold(limit, float((good >= limit).mean()), None, None)
    bad = _scores(outside, "outside")
    limits = np.unique(np.concatenate([good, bad]))
    kept = (good[:, None] >= limits).mean(0)
    refused = (bad[:, None] < limits).mean(0)
    best = int(np.argmax(kept + refused))
    return Threshold(
        float(limits[best]),
        float(kept[best]),
        float(refused[best]),
        separation(good.tolist(), bad.tolist()),
    )


def separation(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Area under the ROC curve: a tie counts half."""
    good, bad = np.asarray(inside, np.float64), np.sort(np.asarray(outside, np.float64))
    below = np.searchsorted(bad, good, "left")
    not_above = np.searchsorted(bad, good, "right")
    return float((below + not_above).mean() / (2 * len(bad)))


def _scores(values: Sequence[float], name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = np.asarray(values, np.float64).reshape(-1)
    if len(found) == 0 or not np.isfinite(found).all():
        raise RetrievalError(f"{name} needs at least one finite score, got {len(found)}")
    return found
