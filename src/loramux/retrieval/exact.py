"""The default index: every candidate is scored, in memory, so nothing is ever missed.

Why not approximate: up to about a million adapters a full scan costs less than encoding the prompt, with or without a
filter. Readers use one view from beginning to end and take no lock; a writer makes the next view and swaps it in.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Literal, Self

import numpy as np

from loramux.retrieval.background import Background, Query, Tally
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.index import Entry, Scored, check_entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.segment import Rows, row_products
from loramux.retrieval.text import NUM_BUCKETS, Floats
from loramux.retrieval.turns import in_turn
from loramux.retrieval.view import View
from loramux.retrieval.where import EVERYTHING, Where

Similarity = Literal["cosine", "ip_raw"]


class ExactIndex:
    """Profiles as arrays in memory. encoder: whose dense vectors it holds, and their width; None keeps none.

    similarity="ip_raw" is the inner product with the mean that was not renormalised, kept to reproduce published rows.
    """

    filters_first = True

    def __init__(
        self,
        encoder_id: str | None = None,
        dim: int | None = None,
        similarity: Similarity = "cosine",
    ) -> None:
        if (encoder_id is None) != (dim is None):
            raise RetrievalError("an index has an encoder's id and its width, or neither")
        self.encoder_id, self.dim, self.similarity = encoder_id, dim, similarity
        self._view = View(Background.empty(dim))
        self._writing = threading.Lock()

    @property
    def background(self) -> Background:
        return self._view.background

    def check(self, entry: Entry) -> None:
        check_entry(entry, self.encoder_id, self.dim)

    def upsert(self, entries: Sequence[Entry]) -> None:
        latest = {entry.id: entry for entry in entries}
        for entry in latest.values():
            self.check(entry)
        with self._writing:
            view = self._view.without(list(latest))
            view = view.adding(list(latest.values()), self.dim)
            self._view = _tidied(view)

    def delete(self, ids: Sequence[str]) -> int:
        with self._writing:
            before = len(self._view.place)
            self._view = _tidied(self._view.without(ids))
            return before - len(self._view.place)

    def search(
        self, query: Query, where: Where = EVERYTHING, ids: AbstractSet[str] | None = None
    ) -> Scored:
        view = self._view
        rows = view.candidates(where, ids)
        lexical, dense = view.scores(query, rows)
        if dense is not None and self.similarity == "ip_raw":
            dense = self._raw(view, query, rows)
        return Scored(view.ids, view.owners, rows, lexical, dense)

    def count(self, where: Where = EVERYTHING) -> int:
        return len(self._view.candidates(where, None))

    def ids(self, where: Where = EVERYTHING) -> list[str]:
        view = self._view
        return sorted(view.ids[row] for row in view.candidates(where, None).tolist())

    def profiles(self, most: int) -> list[Profile]:
        view = self._view
        owned = ((id, view.owners[row]) for id, row in view.place.items())
        return [view.profile(view.place[id], self.encoder_id) for id in in_turn(owned, most)]

    def refresh(self) -> Background:
        with self._writing:
            view = self._view.packed() if self._view.num_dead else self._view
            background = _tally(view, self.dim).background(view.background.version + 1)
            self._view = view.on(_guarded(view, background))
            return self._view.background

    def nearness(self, ids: Sequence[str]) -> Floats:
        view = self._view
        # What was deleted since the search is near to nothing.
        known = [i for i, id in enumerate(ids) if id in view.place]
        rows = np.array([view.place[ids[i]] for i in known], np.int64)
        order = np.argsort(rows)
        found = np.zeros((len(ids), len(ids)), np.float32)
        for i, row in zip(known, rows.tolist(), strict=True):
            found[i, np.array(known)[order]] = self._near(view, row, rows[order])
        return found

    def snapshot(self, path: Path) -> None:
        """One safetensors file; `restore` makes an index of it that answers alike."""
        from loramux.retrieval.snapshot import write_snapshot

        write_snapshot(path, self._view.packed(), self.encoder_id, self.dim, self.similarity)

    @classmethod
    def restore(cls, path: Path) -> Self:
        from loramux.retrieval.snapshot import read_snapshot

        view, encoder_id, dim, similarity = read_snapshot(path)
        made = cls(encoder_id, dim, similarity)
        made._view = view
        return made

    def _near(self, view: View, row: int, rows: Rows) -> Floats:
        profile = view.profile(row, self.encoder_id)
        lexical, dense = view.scores(Query(profile.lexical, profile.direction), rows)
        return lexical if dense is None or np.isnan(dense).any() else dense

    def _raw(self, view: View, query: Query, rows: Rows) -> Floats:
        """Inner products with the means as they are: neither centred nor renormalised."""
        assert query.dense is not None
        found = np.zeros(len(view.ids), np.float32)
        for block in view.blocks:
            own = slice(block.first, block.first + len(block.segment))
            assert block.segment.dense is not None
            found[own] = row_products(block.segment.dense, query.dense) * block.segment.lengths
        return found[rows]


def _tidied(view: View) -> View:
    """Packed once more than half of its rows are dead, or none is alive."""
    return view.packed() if view.num_dead * 2 > len(view.ids) else view


def _tally(view: View, dim: int | None) -> Tally:
    tally = Tally(dim)
    tally.num_profiles = len(view.ids)
    for block in view.blocks:
        segment = block.segment
        tally.seen += np.bincount(segment.buckets, segment.seen, NUM_BUCKETS).astype(np.int64)
        tally.num_samples += int(segment.samples.sum())
        if tally.dense is not None and segment.dense is not None:
            tally.dense += segment.dense.sum(0, dtype=np.float64)
            tally.num_dense += int((segment.lengths > 0).sum())
    return tally


def _guarded(view: View, background: Background) -> Background:
    parts = [
        b.segment.dense[b.segment.lengths > 0] for b in view.blocks if b.segment.dense is not None
    ]
    return background.guarded(np.concatenate(parts)) if parts else background
