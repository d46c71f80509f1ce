"""The requests that the index makes of its collection, and what that collection must look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.qdrant_parts import pages, path_of
from loramux.retrieval.qdrant_scores import Scores

PAGE = 128  # points of one request: with the largest profiles about 10 MB, and a server takes 32
SMALL_PAGE = 1024  # of names alone
INDEXED = (("owner", True), ("base", False), ("readers", False))


class Collection:
    """Made if it is not there. client: a `qdrant_client.QdrantClient`; dim: width of the dense vectors, if any."""

    def __init__(self, client: Any, models: Any, name: str, dim: int | None) -> None:
        self._client, self._models, self.name, self._dim = client, models, name, dim
        self._local = "Local" in type(getattr(client, "_client", None)).__name__
        if client.collection_exists(name):
            self._check()
        else:
            self._create()
        self._index_marks()

    def upsert(self, points: Sequence[Any]) -> None:
        self._client.upsert(self.name, points=points, wait=True)

    def update_vectors(self, points: Sequence[Any]) -> None:
        self._client.update_vectors(self.name, points=points, wait=True)

    def delete(self, points: Sequence[str]) -> None:
        selected = self._models.PointIdsList(points=list(points))
        self._client.delete(self.name, points_selector=selected, wait=True)

    def count(self, wanted: Any) -> int:
        return int(self._client.count(self.name, count_filter=wanted).count)

    def best(
        self, vector: Any, using: str, wanted: Any, limit: int, exact: bool | None = None
    ) -> Scores:
        """Cosines of the nearest points, best first. exact: None where the database has no choice."""
        params = None if exact is None else self._models.SearchParams(exact=exact)
        found = self._client.query_points(
            self.name,
            query=vector,
            using=using,
            query_filter=wanted,
            limit=limit,
            with_payload=False,  # for one field the database reads a point's whole payload, profile and all
            search_params=None if self._local else params,  # local mode is exact, and warns
        )
        return {str(p.id): min(1.0, max(-1.0, p.score)) for p in found.points}

    def first(self, wanted: Any, num: int) -> list[str]:
        """In rising order: that of hashed ids, so a fair sample of all."""
        found = self._client.scroll(
            self.name, scroll_filter=wanted, limit=num, offset=None, with_payload=False
        )
        return [str(point.id) for point in found[0]]

    def owners(self, wanted: Any) -> dict[str, str]:
        """By the entries' ids."""
        found = self.scroll(wanted, ["id", "owner"], SMALL_PAGE)
        return {str(p.payload["id"]): str(p.payload["owner"]) for p in chain.from_iterable(found)}

    def retrieved(self, points: Sequence[str], **what: Any) -> list[Any]:
        """Those of the points that are there."""
        found: list[Any] = []
        for part in pages(points, PAGE):
            found += self._client.retrieve(self.name, list(part), **what)
        return found

    def scroll(self, wanted: Any, payload: Sequence[str], size: int) -> Iterator[list[Any]]:
        offset = None
        while True:
            points, offset = self._client.scroll(
                self.name,
                scroll_filter=wanted,
                limit=size,
                offset=offset,
                with_payload=list(payload),
            )
            yield points
            if offset is None:
                return

    def other(self, there: str, wanted: str) -> RetrievalError:
        return RetrievalError(
            f"the Qdrant collection {self.name!r} holds {there}, this index wants {wanted}; name another collection, "
            "or delete this one: it is filled again from the registry",
            "other_collection",
        )

    def _create(self) -> None:
        models, dense = self._models, {}
        if self._dim is not None:
            dense["dense"] = models.VectorParams(size=self._dim, distance=models.Distance.DOT)
        self._client.create_collection(
            self.name,
            vectors_config=dense,
            sparse_vectors_config={"lexical": models.SparseVectorParams()},
        )

    def _check(self) -> None:
        params = self._client.get_collection(self.name).config.params
        dense, sparse = params.vectors or {}, params.sparse_vectors or {}
        if "lexical" not in sparse:
            raise self.other("no sparse vectors 'lexical'", "them")
        size = dense["dense"].size if isinstance(dense, Mapping) and "dense" in dense else 0
        if self._dim is not None and size != self._dim:
            raise self.other(f"dense vectors of width {size}", f"width {self._dim}")

    def _index_marks(self) -> None:
        """At every start: the process that made the collection may have been stopped before this step."""
        if self._local:
            return  # it has no payload indexes, and warns
        for key, is_tenant in INDEXED:
            schema = self._models.KeywordIndexParams(type="keyword", is_tenant=is_tenant)
            self._client.create_payload_index(self.name, path_of(key), schema)
