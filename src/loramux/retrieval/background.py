"""What the pool as a whole looks like: how common each word is, and the mean of all dense vectors.

Why a version of its own: with the inverse document frequencies and the mean frozen, adding an adapter changes no other
adapter's scores. They are recomputed now and then (`Retriever.refresh`) and the version says which ones were used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loramux.retrieval.profile import Profile
from loramux.retrieval.text import NUM_BUCKETS, Floats, Sparse, counts, sublinear, unit

MIN_POOL_FOR_MEAN = 8  # ours: the mean of a few adapters is mostly themselves
MIN_POOL_FOR_GUARD = 1000  # ours: below, the quantile is one adapter's accident
CENTRAL_SHARE = 0.999


class Tally:
    """Sums over a pool's profiles, from which a background is made."""

    def __init__(self, dim: int | None = None) -> None:
        self.seen = np.zeros(NUM_BUCKETS, np.int64)
        self.num_samples = self.num_profiles = self.num_dense = 0
        self.dense = None if dim is None else np.zeros(dim, np.float64)

    def add(self, profile: Profile) -> None:
        self.seen[profile.lexical.buckets] += profile.seen
        self.num_samples += profile.num_samples
        self.num_profiles += 1
        if self.dense is not None and profile.dense is not None:
            self.dense += unit(profile.dense)
            self.num_dense += 1

    def background(self, version: int) -> Background:
        """Smoothed inverse document frequencies (a sample is a document) and the mean direction of the adapters."""
        idf = 1.0 + np.log((1.0 + self.num_samples) / (1.0 + self.seen))
        mean = None
        if self.dense is not None:
            enough = self.num_dense >= MIN_POOL_FOR_MEAN
            mean = (self.dense / self.num_dense if enough else 0 * self.dense).astype(np.float32)
        return Background(version, idf.astype(np.float32), mean, self.num_profiles)


@dataclass(frozen=True, eq=False)
class Background:
    """idf: per bucket. mean: subtracted from prompts and adapters alike; None where there is no encoder.

    central_limit: cosine to the mean that 99.9 % of the pool stay below; None while the pool is small.
    """

    version: int
    idf: Floats
    mean: Floats | None
    num_profiles: int
    central_limit: float | None = None

    @classmethod
    def empty(cls, dim: int | None) -> Background:
        return Tally(dim).background(0)

    def centrality(self, directions: Floats) -> Floats:
        """Cosine of unit vectors to the pool's mean."""
        assert self.mean is not None
        found: Floats = directions @ unit(self.mean)
        return found

    def guarded(self, directions: Floats) -> Background:
        """This background with the limit that the pool's own unit vectors give."""
        if self.mean is None or len(directions) < MIN_POOL_FOR_GUARD:
            return self
        limit = float(np.quantile(self.centrality(directions), CENTRAL_SHARE))
        return replace(self, central_limit=limit)


@dataclass(frozen=True, eq=False)
class Query:
    """A prompt before any background: unit term frequencies and the unit sentence vector."""

    lexical: Sparse
    dense: Floats | None

    @classmethod
    def of(cls, prompt: str, dense: Floats | None = None) -> Query:
        return cls(sublinear(counts(prompt)), dense)

    def weighted(self, background: Background) -> Sparse:
        """The TF-IDF vector at length 1."""
        buckets = self.lexical.buckets
        return Sparse(buckets, unit(self.lexical.values * background.idf[buckets]))

    def centred(self, background: Background) -> Floats | None:
        """The sentence vector less the pool's mean, at length 1."""
        if self.dense is None or background.mean is None:
            return None
        return unit(self.dense - background.mean)
