"""The same index in a Qdrant server, for registries that outgrow one machine.

Why a collection is only a cache: the registry's database stays the truth, and `Follower` fills an empty collection
again. Points carry finished unit vectors (TF-IDF and centred) and, for the next refresh, the profile they came from.

What differs from the exact index: only the best come back, and of more than `whole` candidates the scores of the best
and of a sample of the others say what they are standardised with. Lexical and dense scores are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from loramux.errors import require
from loramux.retrieval.background import Background, Query, Tally
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.index import Entry, Scored, check_entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.qdrant_collection import PAGE, Collection
from loramux.retrieval.qdrant_parts import (
    both,
    filter_of,
    nearness_of,
    pages,
    path_of,
    payload_of,
    point_id,
    profile_of,
    sparse_of,
    these,
    vectors_of,
)
from loramux.retrieval.qdrant_scores import Both, Scores, best_of, columns, in_both, moments_over
from loramux.retrieval.text import Floats
from loramux.retrieval.turns import in_turn
from loramux.retrieval.where import EVERYTHING, Where

SHORTLIST = 256
WHOLE = 4096
SAMPLE = 1024  # beside the WHOLE best of either half, which are known
TIMEOUT = 60  # seconds; the client's own 5 are too few for a write that waits


class QdrantIndex:
    """One collection for one encoder. client: a `qdrant_client.QdrantClient`.

    whole: up to so many candidates all are scored and the hits are the exact index's. exact: beyond, compare a prompt
    with every candidate's dense vector; False lets the server walk its graph (HNSW) and miss some of the best. The
    lexical half is exact either way.
    """

    filters_first = True

    def __init__(
        self,
        client: Any,
        encoder_id: str | None = None,
        dim: int | None = None,
        *,
        collection: str = "loramux",
        shortlist: int = SHORTLIST,
        whole: int = WHOLE,
        exact: bool = True,
    ) -> None:
        if (encoder_id is None) != (dim is None):
            raise RetrievalError("an index has an encoder's id and its width, or neither")
        if not 1 <= shortlist <= whole:
            raise RetrievalError(
                f"shortlist must be at least 1 and at most whole, got {shortlist} and {whole}"
            )
        self._models = require("qdrant_client.models", "qdrant", "the Qdrant index")
        self._collection = Collection(client, self._models, collection, dim)
        self.shortlist, self.whole, self.exact = shortlist, whole, exact
        self.encoder_id, self.dim = encoder_id, dim
        self._writing = threading.Lock()
        self._background = self._pool_background(0)

    @classmethod
    def connect(
        cls, url: str, encoder_id: str | None = None, dim: int | None = None, **more: Any
    ) -> QdrantIndex:
        """url: http://host:6333, or ":memory:" for tests."""
        qdrant = require("qdrant_client", "qdrant", "the Qdrant index")
        if url == ":memory:":
            return cls(qdrant.QdrantClient(url), encoder_id, dim, **more)
        return cls(qdrant.QdrantClient(url=url, timeout=TIMEOUT), encoder_id, dim, **more)

    @property
    def collection(self) -> str:
        return self._collection.name

    @property
    def background(self) -> Background:
        return self._background

    def check(self, entry: Entry) -> None:
        check_entry(entry, self.encoder_id, self.dim)
        for key in entry.tags:
            path_of(key)

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Pages of them become visible one after the other."""
        for entry in entries:
            self.check(entry)
        with self._writing:
            for part in pages(list({entry.id: entry for entry in entries}.values()), PAGE):
                self._collection.upsert([self._point(entry) for entry in part])

    def delete(self, ids: Sequence[str]) -> int:
        found = 0
        with self._writing:
            for part in pages([point_id(id) for id in dict.fromkeys(ids)], PAGE):
                found += len(self._collection.retrieved(part, with_payload=False))
                self._collection.delete(part)
        return found

    def search(
        self, query: Query, where: Where = EVERYTHING, ids: AbstractSet[str] | None = None
    ) -> Scored:
        models, asked = self._models, _Asked.of(self._models, query, self._background)
        wanted = filter_of(models, where, ids)
        pool = self._collection.first(wanted, self.whole + 1)
        if len(pool) <= self.whole:
            scores = self._scores(asked, wanted, len(pool), exact=True)
            best = (
                pool if len(pool) <= 2 * self.shortlist else best_of(scores, pool, self.shortlist)
            )
            moments = None if best is pool else moments_over(scores, pool)
        else:
            sample = pool[:SAMPLE]
            wider = self._scores(asked, wanted, self.whole, self.exact)
            best = best_of(wider, in_both(wider), self.shortlist)
            best = list(dict.fromkeys([*best, *sample]))[: max(len(best), self.shortlist)]
            chosen = {*sample, *best}
            only = models.Filter(must=[these(models, chosen)])
            scores = self._scores(asked, only, len(chosen), exact=True)
            moments = moments_over(scores, sample, wider, self._collection.count(wanted))
        # Read under the condition once more, so that nothing comes back that was withdrawn meanwhile.
        named = self._collection.owners(both(models, wanted, these(models, best)))
        order = sorted(named)
        lexical, dense = columns(scores, [point_id(id) for id in order])
        owners = [named[id] for id in order]
        return Scored(order, owners, np.arange(len(order)), lexical, dense, moments)

    def count(self, where: Where = EVERYTHING) -> int:
        return self._collection.count(filter_of(self._models, where, None))

    def ids(self, where: Where = EVERYTHING) -> list[str]:
        return sorted(self._collection.owners(filter_of(self._models, where, None)))

    def profiles(self, most: int) -> list[Profile]:
        chosen = in_turn(self._collection.owners(None).items(), most)
        points = [point_id(id) for id in chosen]
        found = self._collection.retrieved(points, with_payload=["id", "profile"])
        return [profile_of(p.payload) for p in sorted(found, key=lambda p: str(p.payload["id"]))]

    def refresh(self) -> Background:
        """Weigh every point anew. Searches meanwhile see old and new points side by side."""
        with self._writing:
            self._background = self._pool_background(self._background.version + 1)
            for part in self._collection.scroll(None, ["profile"], PAGE):
                self._reweigh({str(p.id): profile_of(p.payload) for p in part})
            return self._background

    def nearness(self, ids: Sequence[str]) -> Floats:
        points = [point_id(id) for id in ids]
        found = self._collection.retrieved(points, with_payload=False, with_vectors=True)
        vectors = {str(point.id): point.vector for point in found}
        return nearness_of([vectors.get(point) for point in points])

    def snapshot(self, path: Any) -> None:
        raise RetrievalError(
            "a Qdrant collection is backed up by the server's own snapshots, and can always be made again from the "
            "registry with follow(retriever, registry)",
            "no_snapshot",
        )

    def _point(self, entry: Entry) -> Any:
        vector = vectors_of(self._models, entry.profile, self._background)
        return self._models.PointStruct(
            id=point_id(entry.id), vector=vector, payload=payload_of(entry)
        )

    def _reweigh(self, profiles: dict[str, Profile]) -> None:
        """New vectors and nothing else: marks that another host withdraws meanwhile must not come back."""
        if not profiles:
            return
        make, background = self._models.PointVectors, self._background
        try:
            self._collection.update_vectors(
                [
                    make(id=point, vector=vectors_of(self._models, profile, background))
                    for point, profile in profiles.items()
                ]
            )
        except Exception:
            found = self._collection.retrieved(list(profiles), with_payload=False)
            if len(found) == len(profiles):
                raise
            # Some were deleted since they were read, which a server and local mode both take ill, in other ways.
            self._reweigh({str(point.id): profiles[str(point.id)] for point in found})

    def _scores(self, asked: _Asked, wanted: Any, limit: int, exact: bool) -> Both:
        """Of the best `limit`. What shares no word with the prompt, or has no dense vector, is not among them."""
        lexical: Scores = {}
        dense: Scores | None = None if asked.direction is None else {}
        if limit and asked.words is not None:
            lexical = self._collection.best(asked.words, "lexical", wanted, limit)
        if limit and asked.direction is not None:
            dense = self._collection.best(asked.direction, "dense", wanted, limit, exact)
        return lexical, dense

    def _pool_background(self, version: int) -> Background:
        tally, directions = Tally(self.dim), []
        for point in chain.from_iterable(self._collection.scroll(None, ["profile"], PAGE)):
            profile = profile_of(point.payload)
            if self.encoder_id is not None and profile.encoder_id not in (None, self.encoder_id):
                raise self._collection.other(
                    f"vectors of the encoder {profile.encoder_id!r}",
                    f"those of {self.encoder_id!r}",
                )
            tally.add(profile)
            if self.dim is not None and profile.direction is not None:
                directions.append(profile.direction)
        made = tally.background(version)
        return made.guarded(np.stack(directions)) if directions else made


@dataclass(frozen=True, eq=False)
class _Asked:
    """A prompt as the database takes it. words: None where it has none; direction: None without an encoder."""

    words: Any
    direction: list[float] | None

    @classmethod
    def of(cls, models: Any, query: Query, background: Background) -> _Asked:
        weighted, centred = query.weighted(background), query.centred(background)
        words = sparse_of(models, weighted) if len(weighted.buckets) else None
        return cls(words, None if centred is None else centred.tolist())
