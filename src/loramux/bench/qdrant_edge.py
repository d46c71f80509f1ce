"""A Qdrant client over Qdrant's own engine in this process: what a server would do with the index's requests.

Why: qdrant-client's local mode is a second implementation, in Python. `qdrant-edge-py` is the server's storage and
search as one shard: filters, payload indexes, segments, HNSW and its optimizer. HTTP and clusters are not in it, and
the optimizer does not run by itself (`optimize`).

Only the calls that `QdrantIndex` makes are here. Every request goes through the REST interface's JSON, so what cannot
travel fails, and what is not translated is an error: the engine's own types take no unknown argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loramux.errors import LoramuxError, require


class UntranslatedError(LoramuxError):
    """A request asks for something that is not handed on to the engine."""


class EdgeClient:
    """One shard per collection, under `folder`. through_json=False leaves the JSON out, for large pools.

    indexing_kb, full_scan_kb: from how many KB of vectors on a segment gets HNSW, and a search uses it; a server's
    defaults.
    """

    def __init__(
        self,
        folder: Path,
        *,
        through_json: bool = True,
        indexing_kb: int = 10_000,
        full_scan_kb: int = 10_000,
    ) -> None:
        purpose = "Qdrant's engine without a server"
        self._edge = require("qdrant_edge", "dev", purpose)
        self._models = require("qdrant_client.models", "qdrant", purpose)
        self._folder, self._through_json = folder, through_json
        self._indexing_kb, self._full_scan_kb = indexing_kb, full_scan_kb
        self._made: dict[str, Any] = {}
        self.shards: dict[str, Any] = {}
        self.engine_s = 0.0  # CPU time of searches within the engine

    def collection_exists(self, name: str) -> bool:
        return name in self.shards

    def create_collection(self, name: str, vectors_config: Any, sparse_vectors_config: Any) -> bool:
        edge = self._edge
        asked = self._asked(
            "CreateCollection", vectors=vectors_config, sparse_vectors=sparse_vectors_config
        )
        sparse = asked.pop("sparse_vectors")
        dense = {key: self._dense_params(**params) for key, params in asked.pop("vectors").items()}
        config = edge.EdgeConfig(
            vectors=dense,
            sparse_vectors={key: edge.EdgeSparseVectorParams(**sparse[key]) for key in sparse},
            hnsw_config=edge.HnswIndexConfig(16, 100, self._full_scan_kb),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=self._indexing_kb),
            wal_enabled=False,  # nothing is to survive
            **asked,
        )
        folder = self._folder / name
        folder.mkdir(parents=True)
        self.shards[name] = edge.EdgeShard.create(str(folder), config)
        self._made[name] = SimpleNamespace(
            vectors=vectors_config, sparse_vectors=sparse_vectors_config
        )
        return True

    def get_collection(self, name: str) -> Any:
        return SimpleNamespace(config=SimpleNamespace(params=self._made[name]))

    def create_payload_index(self, name: str, field_name: str, field_schema: Any) -> None:
        asked = self._asked("CreateFieldIndex", field_name=field_name, field_schema=field_schema)
        schema = asked.pop("field_schema")
        if schema.pop("type") != "keyword":
            raise UntranslatedError(f"only keyword indexes are translated, got {field_schema!r}")
        params = self._edge.KeywordIndexParams(**schema)
        self._update(name, "create_field_index", asked.pop("field_name"), params, **asked)

    def upsert(self, name: str, points: Sequence[Any], wait: bool) -> None:
        asked = self._asked("PointsList", points=points)
        found = [
            self._edge.Point(vector=self._vectors(point.pop("vector")), **point)
            for point in asked.pop("points")
        ]
        self._update(name, "upsert_points", found, **asked)

    def update_vectors(self, name: str, points: Sequence[Any], wait: bool) -> None:
        asked = self._asked("UpdateVectors", points=points)
        found = [
            self._edge.PointVectors(vector=self._vectors(point.pop("vector")), **point)
            for point in asked.pop("points")
        ]
        self._update(name, "update_vectors", found, **asked)

    def delete(self, name: str, points_selector: Any, wait: bool) -> None:
        asked = self._asked("PointIdsList", **dict(points_selector))
        self._update(name, "delete_points", asked.pop("points"), **asked)

    def count(self, name: str, count_filter: Any = None) -> Any:
        asked = self._asked("CountRequest", filter=count_filter, exact=True)
        wanted = self._filter(asked.pop("filter", None))
        request = self._edge.CountRequest(filter=wanted, **asked)
        return self._models.CountResult(count=self._timed(self.shards[name].count, request))

    def scroll(
        self, name: str, scroll_filter: Any, *, limit: int, offset: Any, with_payload: Any
    ) -> tuple[list[Any], Any]:
        asked = self._asked(
            "ScrollRequest",
            filter=scroll_filter,
            limit=limit,
            offset=offset,
            with_payload=with_payload,
        )
        wanted = self._filter(asked.pop("filter", None))
        request = self._edge.ScrollRequest(filter=wanted, **asked)
        records, following = self._timed(self.shards[name].scroll, request)
        return [self._record(one) for one in records], following and str(following)

    def retrieve(
        self, name: str, ids: Sequence[str], *, with_payload: Any, with_vectors: bool = False
    ) -> list[Any]:
        asked = self._asked(
            "PointRequest", ids=ids, with_payload=with_payload, with_vector=with_vectors
        )
        records = self.shards[name].retrieve(point_ids=asked.pop("ids"), **asked)
        return [self._record(one) for one in records]

    def query_points(
        self,
        name: str,
        *,
        query: Any,
        using: str,
        query_filter: Any,
        limit: int,
        with_payload: Any,
        search_params: Any = None,
    ) -> Any:
        edge = self._edge
        asked = self._asked(
            "QueryRequest",
            query=query,
            using=using,
            filter=query_filter,
            limit=limit,
            with_payload=with_payload,
            params=search_params,
        )
        nearest = edge.Query.Nearest(self._vector(asked.pop("query")), using=asked.pop("using"))
        params = edge.SearchParams(**asked.pop("params", {}))
        wanted = self._filter(asked.pop("filter", None))
        request = edge.QueryRequest(query=nearest, params=params, filter=wanted, **asked)
        found = [
            SimpleNamespace(id=str(p.id), score=p.score, payload=p.payload)
            for p in self._timed(self.shards[name].query, request)
        ]
        return SimpleNamespace(points=found)

    def optimize(self, name: str) -> int:
        """What a server does by itself: merge and index segments. Returns how many vectors are indexed."""
        self.shards[name].optimize()
        return int(self.shards[name].info().indexed_vectors_count)

    def _asked(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The request as a server reads it."""
        model = getattr(self._models, kind)
        request = model(**{key: value for key, value in fields.items() if value is not None})
        if self._through_json:
            text = request.model_dump_json(exclude_none=True)
            request = model.model_validate_json(text)
        found: dict[str, Any] = request.model_dump(exclude_none=True)
        return found

    def _timed(self, call: Callable[[Any], Any], request: Any) -> Any:
        start = time.process_time()
        found = call(request)
        self.engine_s += time.process_time() - start
        return found

    def _update(self, name: str, operation: str, *values: Any, **more: Any) -> None:
        self.shards[name].update(getattr(self._edge.UpdateOperation, operation)(*values, **more))

    def _dense_params(self, size: int, distance: str, **more: Any) -> Any:
        distance = getattr(self._edge.Distance, distance)
        return self._edge.EdgeVectorParams(size=size, distance=distance, **more)

    def _vectors(self, named: dict[str, Any]) -> dict[str, Any]:
        return {key: self._vector(value) for key, value in named.items()}

    def _vector(self, value: Any) -> Any:
        return self._edge.SparseVector(**value) if isinstance(value, dict) else value

    def _filter(self, asked: dict[str, Any] | None) -> Any:
        if asked is None:
            return None
        parts = {key: [self._condition(each) for each in asked[key]] for key in asked}
        return self._edge.Filter(**parts)

    def _condition(self, asked: dict[str, Any]) -> Any:
        edge = self._edge
        if asked.keys() <= {"must", "should", "must_not"}:
            return self._filter(asked)
        if asked.keys() == {"has_id"}:
            return edge.HasIdCondition(set(asked["has_id"]))
        if asked.keys() == {"key", "match"} and asked["match"].keys() == {"value"}:
            return edge.FieldCondition(asked["key"], match=edge.MatchValue(asked["match"]["value"]))
        raise UntranslatedError(f"only marks, ids and filters of them are translated, got {asked}")

    def _record(self, found: Any) -> Any:
        vector = found.vector and {
            key: self._models.SparseVector(indices=value.indices, values=value.values)
            if isinstance(value, self._edge.SparseVector)
            else value
            for key, value in found.vector.items()
        }
        return self._models.Record(id=str(found.id), payload=found.payload, vector=vector)
