"""A threshold below which retrieval should rather find nothing: from the pool's own profiles, or from held-out prompts.

Why on the lexical score: for "is any adapter of this kind in the pool?" it separates far better than the dense cosine.
The value depends on the pool and on how its users write: `calibrated_threshold` takes it from the profiles, for a rate
of prompts that may wrongly find nothing; who has prompts of both kinds chooses better with `abstain_threshold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from loramux.retrieval.background import Background
from loramux.retrieval.drawn import Doubles, digest_of, draw_scores
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.profile import Profile

Written = Literal["with", "without", "either"]
MIN_PROFILES = 8  # ours: of fewer the threshold would be one adapter's accident
MAX_PROFILES = 256  # ours: what is looked at of a large pool
NUM_DRAWS = 2048  # ours: prompts drawn in all, at least two of each profile and kind
FALLBACK = 0.05  # ours, of small pools: below it a prompt shares next to no words with any adapter's samples


@dataclass(frozen=True)
class AbstainAt:
    """Where a Retriever's threshold comes from: its pool's profiles.

    rate: share of prompts with an adapter of their own that may find nothing. instruction: whether they come with the
    words that most samples of their adapter share, without them, or as often with as without.
    """

    rate: float = 0.05
    instruction: Written = "either"

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < 1.0:
            raise RetrievalError(
                f"the rate of prompts that wrongly find nothing must lie in (0, 1), got {self.rate}"
            )
        if self.instruction not in get_args(Written):
            raise RetrievalError(
                f"instruction must be one of {', '.join(get_args(Written))}, got {self.instruction!r}"
            )


@dataclass(frozen=True)
class Calibration:
    """min_score, and the share of drawn prompts it refuses whose own adapter is left out. digest: of the profiles and
    word frequencies it was worked out from; None where they were too few and the fixed value stands in. at: what it
    was worked out for."""

    min_score: float
    refused: float | None
    digest: str | None
    at: AbstainAt | None = None


def calibrated_threshold(
    profiles: Sequence[Profile],
    background: Background,
    at: AbstainAt | None = None,
    known: Calibration | None = None,
) -> Calibration:
    """The threshold at which the rate of drawn prompts finds nothing. known: given back if nothing has changed."""
    at = AbstainAt() if at is None else at
    usable = [profile for profile in profiles if profile.num_samples > 1]
    if len(usable) < MIN_PROFILES:
        return Calibration(FALLBACK, None, None)
    digest = digest_of(usable, background)
    if known is not None and (known.digest, known.at) == (digest, at):
        return known
    drawn = draw_scores(usable, background, max(2, NUM_DRAWS // (2 * len(usable))))
    kind = drawn.with_instruction
    chosen = {"with": kind * 1.0, "without": ~kind * 1.0}.get(at.instruction)
    weight: Doubles = np.zeros(0) if chosen is None else np.asarray(chosen, np.float64)
    if chosen is None:
        weight = np.where(kind, 1.0 / max(1, kind.sum()), 1.0 / max(1, (~kind).sum()))
    if not weight.any():
        return Calibration(FALLBACK, None, None)
    limit = _weighted_quantile(drawn.inside, weight, at.rate)
    refused = float(((drawn.outside < limit) * weight).sum() / weight.sum())
    return Calibration(limit, refused, digest, at)


def _weighted_quantile(values: Doubles, weight: Doubles, share: float) -> float:
    """The largest value with no more than `share` of the weight below it."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weight[order]) - weight[order]
    return float(values[order][below <= share * weight.sum()][-1])


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
