"""A block of profiles as arrays that never change: rows by bucket for few candidates, buckets by row for many.

Why both: a tenant with three adapters should cost three rows, and a search over everything should only touch the
buckets that the prompt has. Both ways add the same numbers in the same order, so their sums agree to the last bit.

Letters: R rows, N stored values, D dense width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Background
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.text import NUM_BUCKETS, Floats, Ints, Sparse, unit

MANY_ROWS = 1 << 13
Rows: TypeAlias = NDArray[np.int64]
PLAIN = (
    "buckets",
    "values",
    "seen",
    "samples",
    "seeds",
    "lengths",
)  # always there, one after the other


@dataclass(frozen=True, eq=False)
class Segment:
    """starts [R + 1] into buckets, values, seen [N]; dense [R, D] at length 1, zero where absent; lengths [R] before
    that, 0 where absent."""

    starts: Rows
    buckets: Ints
    values: Floats
    seen: NDArray[np.uint16]
    samples: NDArray[np.int32]
    seeds: NDArray[np.int64]
    dense: Floats | None
    lengths: Floats

    @classmethod
    def of(cls, entries: Sequence[Entry], dim: int | None) -> Segment:
        profiles = [entry.profile for entry in entries]
        sizes = [len(p.lexical.buckets) for p in profiles]
        dense, lengths = None, np.zeros(len(profiles), np.float32)
        if dim is not None:
            dense = np.zeros((len(profiles), dim), np.float32)
            for row, profile in enumerate(profiles):
                if profile.dense is not None:
                    dense[row] = unit(profile.dense)
                    lengths[row] = np.linalg.norm(profile.dense)
        return cls(
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([p.lexical.buckets for p in profiles]),
            np.concatenate([p.lexical.values for p in profiles]),
            np.concatenate([p.seen for p in profiles]),
            np.array([p.num_samples for p in profiles], np.int32),
            np.array([p.seed for p in profiles], np.int64),
            dense,
            lengths,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: Rows) -> Segment:
        """These rows only."""
        sizes = np.diff(self.starts)[rows]
        where = spans(self.starts[rows], sizes)
        return Segment(
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            self.buckets[where],
            self.values[where],
            self.seen[where],
            self.samples[rows],
            self.seeds[rows],
            None if self.dense is None else self.dense[rows],
            self.lengths[rows],
        )

    def joined(self, other: Segment) -> Segment:
        """Rows of this one, then rows of the other."""

        def both(name: str) -> Any:
            return np.concatenate([getattr(self, name), getattr(other, name)])

        return Segment(
            starts=np.concatenate([self.starts, self.starts[-1] + other.starts[1:]]),
            dense=None if self.dense is None else both("dense"),
            **{name: both(name) for name in PLAIN},
        )

    def profile(self, row: int, encoder_id: str | None) -> Profile:
        """The profile as it was given, except for the rounding of the dense mean."""
        part = slice(int(self.starts[row]), int(self.starts[row + 1]))
        has_dense = self.dense is not None and self.lengths[row] > 0
        dense = (
            self.dense[row] * self.lengths[row] if has_dense and self.dense is not None else None
        )
        return Profile(
            Sparse(self.buckets[part], self.values[part]),
            self.seen[part],
            dense,
            encoder_id if has_dense else None,
            int(self.samples[row]),
            int(self.seeds[row]),
        )

    @cached_property
    def postings(self) -> tuple[Rows, Ints, Floats]:
        """Starts by bucket, then rows and values; within a bucket rows rise."""
        row_of = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))
        order = np.argsort(self.buckets, kind="stable")
        sizes = np.bincount(self.buckets, minlength=NUM_BUCKETS)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return starts, row_of[order], self.values[order]

    def lexical_sums(self, gains: Sparse, rows: Rows | None) -> NDArray[np.float64]:
        """Inner product with every row, or with some: float32 products added up in float64, by rising bucket."""
        if rows is None:
            return self._all_sums(gains)
        sizes = np.diff(self.starts)[rows]
        where = spans(self.starts[rows], sizes)
        table = np.zeros(NUM_BUCKETS, np.float32)
        table[gains.buckets] = gains.values
        products = table[self.buckets[where]] * self.values[where]
        owner = np.repeat(np.arange(len(rows)), sizes)
        sums: NDArray[np.float64] = np.bincount(owner, products, len(rows)).astype(np.float64)
        return sums

    def _all_sums(self, gains: Sparse) -> NDArray[np.float64]:
        starts, rows, values = self.postings
        sums = np.zeros(len(self), np.float64)
        for bucket, gain in zip(gains.buckets.tolist(), gains.values, strict=True):
            part = slice(starts[bucket], starts[bucket + 1])
            # A row has a bucket at most once, so += never meets the same row twice.
            sums[rows[part]] += gain * values[part]
        return sums

    def lexical_lengths(self, background: Background) -> Floats:
        """Length of every row's TF-IDF vector; never 0, so that it can be divided by."""
        row_of = np.repeat(np.arange(len(self)), np.diff(self.starts))
        weighted = self.values * background.idf[self.buckets]
        squares = np.bincount(row_of, np.square(weighted, dtype=np.float64), len(self))
        return np.sqrt(np.maximum(squares, 1e-24)).astype(np.float32)

    def dense_offsets(self, background: Background) -> tuple[Floats, Floats]:
        """Per row: its inner product with the mean, and its length once the mean is subtracted."""
        if self.dense is None or background.mean is None:
            return self.lengths, self.lengths
        mean = background.mean
        along = row_products(self.dense, mean)
        # |c - m|^2 written out would lose digits where c is close to m.
        away = np.sqrt(np.einsum("rd,rd->r", self.dense - mean, self.dense - mean))
        return along, np.maximum(away, 1e-6)


def row_products(matrix: Floats, vector: Floats) -> Floats:
    """Inner products row by row.

    einsum where it is cheap: BLAS is twice as fast, but rounds a row differently when the number of rows changes.
    """
    many = len(matrix) >= MANY_ROWS
    found: Floats = matrix @ vector if many else np.einsum("rd,d->r", matrix, vector)
    return found


def spans(starts: Rows, sizes: Rows) -> Rows:
    """Indices starts[i] .. starts[i] + sizes[i] of all i, one after the other."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)
