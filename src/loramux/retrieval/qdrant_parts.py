"""What goes to Qdrant and comes back: ids, points, filters.

A point carries its entry's marks as lists under `marks`, one list a key, and for the next refresh the whole profile.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from loramux.retrieval.background import Background, Query
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.text import Floats, Sparse, unit
from loramux.retrieval.where import Mark, Where

# Any fixed one: ids become UUIDs under it.
_NAMES = uuid.UUID("6f3a5a55-9f0b-5a0e-8d0e-1f1c7a1f2b60")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


def point_id(id: str) -> str:
    """The UUID of an entry's id; the database takes no other texts."""
    return str(uuid.uuid5(_NAMES, id))


def path_of(key: str) -> str:
    """Where a mark's values lie in the payload."""
    if _PLAIN.fullmatch(key):
        return f"marks.{key}"
    if '"' in key or "\\" in key:
        raise RetrievalError(
            f"a tag's key in a Qdrant collection has neither quotes nor backslashes, got {key!r}"
        )
    return f'marks."{key}"'  # a dot would mean a field within a field


def filter_of(models: Any, where: Where, ids: AbstractSet[str] | None) -> Any:
    """The same condition for the database; None for everything."""
    must = [_clause(models, clause) for clause in where.clauses]
    if ids is not None:
        must.append(these(models, [point_id(id) for id in ids]))
    return models.Filter(must=must) if must else None


def these(models: Any, points: Iterable[str]) -> Any:
    """Only these points; of none, nothing."""
    return models.HasIdCondition(has_id=sorted(points))


def both(models: Any, wanted: Any, condition: Any) -> Any:
    """A filter of `filter_of`, and this condition."""
    return models.Filter(must=[condition, *([] if wanted is None else wanted.must)])


def payload_of(entry: Entry) -> dict[str, Any]:
    marks: dict[str, list[str]] = {}
    for key, value in sorted(entry.marks):
        marks.setdefault(key, []).append(value)
    profile = base64.b64encode(entry.profile.to_bytes()).decode()
    return {"id": entry.id, "owner": entry.owner, "marks": marks, "profile": profile}


def profile_of(payload: Any) -> Profile:
    return Profile.from_bytes(base64.b64decode(payload["profile"]))


def vectors_of(models: Any, profile: Profile, background: Background) -> dict[str, Any]:
    """The finished unit vectors of a profile."""
    weighted = Query(profile.lexical, None).weighted(background)
    found: dict[str, Any] = {"lexical": sparse_of(models, weighted)}
    if profile.direction is not None and background.mean is not None:
        found["dense"] = unit(profile.direction - background.mean).tolist()
    return found


def sparse_of(models: Any, sparse: Sparse) -> Any:
    return models.SparseVector(indices=sparse.buckets.tolist(), values=sparse.values.tolist())


def nearness_of(vectors: Sequence[Any]) -> Floats:
    """[n, n] inner products: dense where all have one, else lexical. None: of a point that is gone, near to nothing."""
    there = [i for i, vector in enumerate(vectors) if vector is not None]
    known = [vectors[i] for i in there]
    if all("dense" in vector for vector in known):
        dense = np.array([vector["dense"] for vector in known], np.float32)
        near = dense @ dense.T
    else:
        lexical = [vector["lexical"] for vector in known]
        near = np.array([[_overlap(a, b) for b in lexical] for a in lexical], np.float32)
    found = np.zeros((len(vectors), len(vectors)), np.float32)
    if there:
        found[np.ix_(there, there)] = near
    return found


def pages(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _clause(models: Any, clause: tuple[Mark, ...]) -> Any:
    if not clause:
        return these(models, ())  # holds for nothing, where `should=[]` would hold for everything
    conditions = [
        models.FieldCondition(key=path_of(key), match=models.MatchValue(value=value))
        for key, value in clause
    ]
    return models.Filter(should=conditions)


def _overlap(a: Any, b: Any) -> float:
    left = dict(zip(a.indices, a.values, strict=True))
    return float(sum(left.get(i, 0.0) * v for i, v in zip(b.indices, b.values, strict=True)))
