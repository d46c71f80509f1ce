"""The same index in a Qdrant server, for registries that outgrow one machine.

Why a collection is only a cache: the registry's database stays the truth, and `Follower` fills an empty collection
again. Points carry finished unit vectors (TF-IDF and centred) and, for the next refresh, the profile they came from.

What differs from the exact index: standardisation runs over a shortlist of the best by words and the best by meaning,
not over all candidates. Where the candidates fit into the shortlist both give the same scores.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from loramux.errors import require
from loramux.retrieval.background import Background, Query, Tally
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.index import Entry, Scored, check_entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.text import Floats, Sparse, unit
from loramux.retrieval.turns import in_turn
from loramux.retrieval.where import EVERYTHING, Mark, Where

SHORTLIST = 256
PAGE = 256
_NAMES = uuid.UUID(
    "6f3a5a55-9f0b-5a0e-8d0e-1f1c7a1f2b60"
)  # any fixed one: ids become UUIDs under it


class QdrantIndex:
    """One collection for one encoder. client: a `qdrant_client.QdrantClient`."""

    filters_first = True

    def __init__(
        self,
        client: Any,
        encoder_id: str | None = None,
        dim: int | None = None,
        *,
        collection: str = "loramux",
        shortlist: int = SHORTLIST,
    ) -> None:
        self._models = require("qdrant_client.models", "qdrant", "the Qdrant index")
        self._client, self._collection, self.shortlist = client, collection, shortlist
        self.encoder_id, self.dim = encoder_id, dim
        self._background = Background.empty(dim)
        if not client.collection_exists(collection):
            self._create()
        else:
            self._background = self._pool_background(0)

    @classmethod
    def connect(
        cls, url: str, encoder_id: str | None = None, dim: int | None = None, **more: Any
    ) -> QdrantIndex:
        """url: http://host:6333, or ":memory:" for tests."""
        qdrant = require("qdrant_client", "qdrant", "the Qdrant index")
        client = qdrant.QdrantClient(url) if url == ":memory:" else qdrant.QdrantClient(url=url)
        return cls(client, encoder_id, dim, **more)

    @property
    def background(self) -> Background:
        return self._background

    def check(self, entry: Entry) -> None:
        check_entry(entry, self.encoder_id, self.dim)

    def upsert(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.check(entry)
        for part in _pages(list({entry.id: entry for entry in entries}.values())):
            points = [self._point(entry) for entry in part]
            self._client.upsert(self._collection, points=points, wait=True)

    def delete(self, ids: Sequence[str]) -> int:
        before = self.count()
        points = self._models.PointIdsList(points=[point_id(id) for id in ids])
        self._client.delete(self._collection, points_selector=points, wait=True)
        return before - self.count()

    def search(
        self, query: Query, where: Where = EVERYTHING, ids: AbstractSet[str] | None = None
    ) -> Scored:
        wanted = self._filter(where, ids)
        lexical = self._by_words(query, wanted)
        dense = self._by_meaning(query, wanted)
        names = {**lexical, **(dense or {})}
        if len(names) < self.shortlist:
            names |= self._others(wanted, self.shortlist - len(names), names)
        order = sorted(names)
        lexical |= self._by_words(query, self._only(order, lexical))
        if dense is not None:
            dense |= self._by_meaning(query, self._only(order, dense)) or {}
        return Scored(
            order,
            [names[id][1] for id in order],
            np.arange(len(order)),
            np.array([lexical[id][0] if id in lexical else 0.0 for id in order], np.float32),
            None if dense is None else _or_nan(dense, order),
        )

    def count(self, where: Where = EVERYTHING) -> int:
        found = self._client.count(self._collection, count_filter=self._filter(where, None))
        return int(found.count)

    def ids(self, where: Where = EVERYTHING) -> list[str]:
        return sorted(str(p.payload["id"]) for p in self._scroll(self._filter(where, None), ["id"]))

    def profiles(self, most: int) -> list[Profile]:
        named = (p.payload for p in self._scroll(None, ["id", "owner"]))
        chosen = in_turn(((str(one["id"]), str(one["owner"])) for one in named), most)
        points = [point_id(id) for id in chosen]
        found = self._client.retrieve(self._collection, points, with_payload=["id", "profile"])
        return [_profile(p.payload) for p in sorted(found, key=lambda p: str(p.payload["id"]))]

    def refresh(self) -> Background:
        """Weigh every point anew. Searches meanwhile see old and new points side by side."""
        self._background = self._pool_background(self._background.version + 1)
        for part in _pages(list(self._scroll(None, True))):
            points = [self._point(_entry(point.payload)) for point in part]
            self._client.upsert(self._collection, points=points, wait=True)
        return self._background

    def nearness(self, ids: Sequence[str]) -> Floats:
        points = [point_id(id) for id in ids]
        found = self._client.retrieve(
            self._collection, points, with_vectors=True, with_payload=False
        )
        vectors = {str(point.id): point.vector for point in found}
        rows = [vectors[point] for point in points]
        if all("dense" in row for row in rows):
            dense = np.array([row["dense"] for row in rows], np.float32)
            return np.asarray(dense @ dense.T, np.float32)
        return np.array(
            [[_overlap(a["lexical"], b["lexical"]) for b in rows] for a in rows], np.float32
        )

    def snapshot(self, path: Any) -> None:
        raise RetrievalError(
            "a Qdrant collection is backed up by the server's own snapshots, and can always be made again from the "
            "registry with follow(retriever, registry)",
            "no_snapshot",
        )

    def _create(self) -> None:
        models = self._models
        dense = {}
        if self.dim is not None:
            dense["dense"] = models.VectorParams(size=self.dim, distance=models.Distance.DOT)
        self._client.create_collection(
            self._collection,
            vectors_config=dense,
            sparse_vectors_config={"lexical": models.SparseVectorParams()},
        )
        if "Local" in type(getattr(self._client, "_client", None)).__name__:
            return  # it has no payload indexes, and warns
        for key, is_tenant in (("owner", True), ("base", False), ("readers", False)):
            schema = models.KeywordIndexParams(type="keyword", is_tenant=is_tenant)
            self._client.create_payload_index(self._collection, f"marks.{key}", schema)

    def _point(self, entry: Entry) -> Any:
        models, profile = self._models, entry.profile
        marks: dict[str, list[str]] = {}
        for key, value in sorted(entry.marks):
            marks.setdefault(key, []).append(value)
        weighted = self._weighted(profile.lexical)
        vector: dict[str, Any] = {"lexical": models.SparseVector(**_lists(weighted))}
        direction = profile.direction
        if direction is not None and self._background.mean is not None:
            vector["dense"] = unit(direction - self._background.mean).tolist()
        payload = {
            "id": entry.id,
            "owner": entry.owner,
            "marks": marks,
            "profile": base64.b64encode(profile.to_bytes()).decode(),
        }
        return models.PointStruct(id=point_id(entry.id), vector=vector, payload=payload)

    def _weighted(self, lexical: Sparse) -> Sparse:
        return Query(lexical, None).weighted(self._background)

    def _by_words(self, query: Query, wanted: Any) -> dict[str, tuple[float, str]]:
        weighted = query.weighted(self._background)
        if wanted is _NOTHING or len(weighted.buckets) == 0:
            return {}
        return self._query(self._models.SparseVector(**_lists(weighted)), "lexical", wanted)

    def _by_meaning(self, query: Query, wanted: Any) -> dict[str, tuple[float, str]] | None:
        centred = query.centred(self._background)
        if centred is None:
            return None
        return {} if wanted is _NOTHING else self._query(centred.tolist(), "dense", wanted)

    def _query(self, vector: Any, using: str, wanted: Any) -> dict[str, tuple[float, str]]:
        """{id: (score, owner)} of the best; a score is clipped to a cosine."""
        found = self._client.query_points(
            self._collection,
            query=vector,
            using=using,
            query_filter=wanted,
            limit=self.shortlist,
            with_payload=["id", "owner"],
        )
        return {
            str(p.payload["id"]): (min(1.0, max(-1.0, p.score)), str(p.payload["owner"]))
            for p in found.points
        }

    def _others(self, wanted: Any, num: int, known: dict[str, Any]) -> dict[str, tuple[float, str]]:
        """Candidates that neither search gave, such as those that share no word with the prompt."""
        found: dict[str, tuple[float, str]] = {}
        for point in self._scroll(wanted, ["id", "owner"]):
            if len(found) == num:
                break
            if point.payload["id"] not in known:
                found[str(point.payload["id"])] = (0.0, str(point.payload["owner"]))
        return found

    def _only(self, order: Sequence[str], known: dict[str, Any]) -> Any:
        missing = [point_id(id) for id in order if id not in known]
        if not missing:
            return _NOTHING
        return self._models.Filter(must=[self._models.HasIdCondition(has_id=missing)])

    def _filter(self, where: Where, ids: AbstractSet[str] | None) -> Any:
        models = self._models
        must: list[Any] = [models.Filter(should=[self._has(m) for m in c]) for c in where.clauses]
        if ids is not None:
            must.append(models.HasIdCondition(has_id=sorted(point_id(id) for id in ids)))
        return models.Filter(must=must) if must else None

    def _has(self, mark: Mark) -> Any:
        key, value = mark
        match = self._models.MatchValue(value=value)
        return self._models.FieldCondition(key=f"marks.{key}", match=match)

    def _scroll(self, wanted: Any, payload: Any) -> Iterator[Any]:
        offset = None
        while True:
            points, offset = self._client.scroll(
                self._collection, wanted, limit=PAGE, offset=offset, with_payload=payload
            )
            yield from points
            if offset is None:
                return

    def _pool_background(self, version: int) -> Background:
        tally, directions = Tally(self.dim), []
        for point in self._scroll(None, ["profile"]):
            profile = _profile(point.payload)
            tally.add(profile)
            if profile.direction is not None:
                directions.append(profile.direction)
        made = tally.background(version)
        return made.guarded(np.stack(directions)) if directions else made


_NOTHING = object()


def point_id(id: str) -> str:
    """The UUID of an entry's id; the database takes no other texts."""
    return str(uuid.uuid5(_NAMES, id))


def _pages(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + PAGE] for start in range(0, len(items), PAGE))


def _lists(sparse: Sparse) -> dict[str, Any]:
    return {"indices": sparse.buckets.tolist(), "values": sparse.values.tolist()}


def _or_nan(scores: dict[str, tuple[float, str]], order: Sequence[str]) -> Floats:
    return np.array([scores[id][0] if id in scores else np.nan for id in order], np.float32)


def _profile(payload: Any) -> Profile:
    return Profile.from_bytes(base64.b64decode(payload["profile"]))


def _entry(payload: Any) -> Entry:
    marks = {key: tuple(values) for key, values in payload["marks"].items() if key != "owner"}
    return Entry(str(payload["id"]), _profile(payload), str(payload["owner"]), marks)


def _overlap(a: Any, b: Any) -> float:
    left = dict(zip(a.indices, a.values, strict=True))
    return float(
        sum(left.get(i, 0.0) * value for i, value in zip(b.indices, b.values, strict=True))
    )
