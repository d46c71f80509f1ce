"""What one search of the exact index reads: an immutable state of the pool, and the next states made from it.

Why stable rows: merging segments never renumbers a row, so marks and ids only grow at their end. Rows of deleted
entries stay behind until they are many; then the pool is packed anew.

Segments merge like a binary counter: adding n profiles one by one costs n log n in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Background, Query
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.segment import Rows, Segment, row_products
from loramux.retrieval.text import Floats, Sparse
from loramux.retrieval.where import EVERYTHING, Mark, Where

FEW = 64  # where at most one row in so many is a candidate, rows are scored one by one: measured at 100,000
MAX_CACHED = 256  # conditions whose rows are remembered per view


@dataclass(frozen=True, eq=False)
class Block:
    """A segment, its first row in the pool, and what the background makes of its rows."""

    segment: Segment
    first: int
    lexical_lengths: Floats
    along_mean: Floats
    away: Floats

    @classmethod
    def of(cls, segment: Segment, first: int, background: Background) -> Block:
        lengths = segment.lexical_lengths(background)
        segment.postings  # noqa: B018 - built now, or the first search would pay for it
        return cls(segment, first, lengths, *segment.dense_offsets(background))


@dataclass(frozen=True, eq=False)
class View:
    """ids, owners: by row. place: row of every living id. marked: rows that carry a mark, dead ones included."""

    background: Background
    blocks: tuple[Block, ...] = ()
    ids: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    place: dict[str, int] = field(default_factory=dict)
    marked: dict[Mark, Rows] = field(default_factory=dict)
    alive: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    cache: dict[object, Rows] = field(default_factory=dict)

    @property
    def num_dead(self) -> int:
        return len(self.ids) - len(self.place)

    def without(self, ids: Sequence[str]) -> View:
        """The state in which these ids are gone."""
        gone = [self.place[id] for id in dict.fromkeys(ids) if id in self.place]
        if not gone:
            return self
        alive = self.alive.copy()
        alive[gone] = False
        place = dict(self.place)
        for row in gone:
            del place[self.ids[row]]
        return replace(self, alive=alive, place=place, cache={})

    def adding(self, entries: Sequence[Entry], dim: int | None) -> View:
        """The state with these entries at the end; none of their ids may be alive."""
        if not entries:
            return self
        first = len(self.ids)
        place = dict(self.place)
        place.update((entry.id, first + i) for i, entry in enumerate(entries))
        return replace(
            self,
            blocks=self._with_block(Segment.of(entries, dim)),
            ids=(*self.ids, *(entry.id for entry in entries)),
            owners=(*self.owners, *(entry.owner for entry in entries)),
            place=place,
            marked=_marked(self.marked, [entry.marks for entry in entries], first),
            alive=np.concatenate([self.alive, np.ones(len(entries), np.bool_)]),
            cache={},
        )

    def on(self, background: Background) -> View:
        """The same entries seen against another background."""
        blocks = tuple(Block.of(b.segment, b.first, background) for b in self.blocks)
        return replace(self, background=background, blocks=blocks, cache={})

    def packed(self) -> View:
        """The same entries in one segment, without the rows of deleted ones."""
        whole = self.whole()
        if whole is None:
            return View(self.background)
        rows = np.flatnonzero(self.alive)
        ids = tuple(self.ids[row] for row in rows.tolist())
        new = np.full(len(self.ids), -1)
        new[rows] = np.arange(len(rows))
        marked = {mark: kept for mark, old in self.marked.items() if len(kept := _kept(new, old))}
        return View(
            self.background,
            (Block.of(whole.take(rows), 0, self.background),) if len(rows) else (),
            ids,
            tuple(self.owners[row] for row in rows.tolist()),
            {id: row for row, id in enumerate(ids)},
            marked,
            np.ones(len(rows), np.bool_),
        )

    def whole(self) -> Segment | None:
        """All rows as one segment, dead ones included."""
        found: Segment | None = None
        for block in self.blocks:
            found = block.segment if found is None else found.joined(block.segment)
        return found

    def profile(self, row: int, encoder_id: str | None) -> Profile:
        """The profile in a row of the pool."""
        block = next(b for b in reversed(self.blocks) if b.first <= row)
        return block.segment.profile(row - block.first, encoder_id)

    def candidates(self, where: Where, ids: AbstractSet[str] | None) -> Rows:
        """Rows that a search may return, rising."""
        key = (where, ids) if ids is None or isinstance(ids, frozenset) else None
        known = self.cache.get(key) if key is not None else None
        if known is not None:
            return known
        rows = self._rows(where, ids)
        if key is not None and len(self.cache) < MAX_CACHED:
            self.cache[key] = rows
        return rows

    def scores(self, query: Query, rows: Rows) -> tuple[Floats, Floats | None]:
        """Lexical and dense cosines of the rows; dense is NaN where an entry has none."""
        weighted, dense = query.weighted(self.background), query.centred(self.background)
        gains = Sparse(weighted.buckets, weighted.values * self.background.idf[weighted.buckets])
        parts = [self._block_scores(block, gains, dense, rows) for block in self.blocks]
        lexical = np.concatenate([part[0] for part in parts] or [np.zeros(0, np.float32)])
        if dense is None:
            return lexical, None
        return lexical, np.concatenate([part[1] for part in parts] or [np.zeros(0, np.float32)])

    def _block_scores(
        self, block: Block, gains: Sparse, dense: Floats | None, rows: Rows
    ) -> tuple[Floats, Floats]:
        segment = block.segment
        low, high = np.searchsorted(rows, [block.first, block.first + len(segment)])
        own = rows[low:high] - block.first
        few = None if len(own) * FEW > len(segment) else own
        sums = segment.lexical_sums(gains, few)
        lexical = (sums if few is not None else sums[own]) / block.lexical_lengths[own]
        if dense is None or segment.dense is None:
            return _cosines(lexical), np.zeros(0, np.float32)
        products = (
            row_products(segment.dense[own], dense)
            if few is not None
            else row_products(segment.dense, dense)[own]
        )
        mean = self.background.mean
        assert mean is not None
        found = (products - float(dense @ mean)) / block.away[own]
        return _cosines(lexical), np.where(segment.lengths[own] > 0, _cosines(found), np.nan)

    def _rows(self, where: Where, ids: AbstractSet[str] | None) -> Rows:
        if ids is not None:
            found = [self.place[id] for id in ids if id in self.place]
            rows = np.sort(np.array(found, dtype=np.int64))
        else:
            rows = np.flatnonzero(self.alive)
        if where != EVERYTHING and len(rows):
            rows = rows[self._holds(where)[rows]]
        return rows

    def _holds(self, where: Where) -> NDArray[np.bool_]:
        kept = np.ones(len(self.ids), np.bool_)
        for clause in where.clauses:
            holds = np.zeros(len(self.ids), np.bool_)
            for mark in clause:
                holds[self.marked.get(mark, np.zeros(0, np.int64))] = True
            kept &= holds
        return kept

    def _with_block(self, segment: Segment) -> tuple[Block, ...]:
        blocks = list(self.blocks)
        first = len(self.ids)
        while blocks and len(blocks[-1].segment) <= 2 * len(segment):
            last = blocks.pop()
            segment, first = last.segment.joined(segment), last.first
        return (*blocks, Block.of(segment, first, self.background))


def _cosines(values: NDArray[np.floating]) -> Floats:
    found: Floats = np.clip(values, -1.0, 1.0).astype(np.float32)
    return found


def _marked(
    old: dict[Mark, Rows], marks: Sequence[AbstractSet[Mark]], first: int
) -> dict[Mark, Rows]:
    more: dict[Mark, list[int]] = {}
    for row, own in enumerate(marks, start=first):
        for mark in own:
            more.setdefault(mark, []).append(row)
    found = dict(old)
    for mark, rows in more.items():
        new = np.array(rows, np.int64)
        found[mark] = np.concatenate([old[mark], new]) if mark in old else new
    return found


def _kept(new: Rows, old: Rows) -> Rows:
    moved = new[old]
    return moved[moved >= 0]
