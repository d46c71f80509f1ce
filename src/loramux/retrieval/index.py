"""What a store of profiles must be able to do, in memory or in a database of its own.

Why `where` is part of a search: an index that ranks first and filters afterwards loses small tenants. One that cannot
filter first says so (`filters_first`) and is refused by the `Retriever`.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Background, Query
from loramux.retrieval.errors import ProfileError
from loramux.retrieval.profile import Profile
from loramux.retrieval.text import Floats
from loramux.retrieval.where import EVERYTHING, Mark, Tags, Where, marks_of


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapter to be found: `owner` is who contributed it, `tags` what it may be filtered by."""

    id: str
    profile: Profile
    owner: str
    tags: Tags = field(default_factory=dict)

    @property
    def marks(self) -> frozenset[Mark]:
        return marks_of(self.owner, self.tags)


Moments: TypeAlias = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Scored:
    """Candidates with both scores, in no particular order. dense: None without one, NaN where an adapter has none.

    ids and owners may belong to a larger pool: candidate i is `ids[places[i]]`. moments: mean and deviation
    of both scores over all candidates, where these are only the best of at least `rank.MIN_FOR_Z`.
    """

    ids: Sequence[str]
    owners: Sequence[str]
    places: NDArray[np.int64]
    lexical: Floats
    dense: Floats | None
    moments: tuple[Moments, Moments] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def id(self, i: int) -> str:
        return self.ids[int(self.places[i])]

    def owner(self, i: int) -> str:
        return self.owners[int(self.places[i])]


class Index(Protocol):
    """Keeps entries and scores them. Safe to search from several threads while one writes."""

    @property
    def filters_first(self) -> bool:
        """True if `where` and `ids` limit the search itself."""
        ...

    @property
    def background(self) -> Background: ...

    def check(self, entry: Entry) -> None:
        """Raise ProfileError if this entry's vectors cannot be compared with those of the index."""
        ...

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Add, or replace what has the same id; all of them become visible at once."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Forget these; returns how many there were."""
        ...

    def search(
        self, query: Query, where: Where = EVERYTHING, ids: AbstractSet[str] | None = None
    ) -> Scored:
        """Score the candidates: entries for which `where` holds and, if given, whose id is in `ids`."""
        ...

    def count(self, where: Where = EVERYTHING) -> int: ...

    def ids(self, where: Where = EVERYTHING) -> list[str]:
        """In rising order."""
        ...

    def profiles(self, most: int) -> list[Profile]:
        """At most so many, contributors in turn (`in_turn`), by rising id."""
        ...

    def refresh(self) -> Background:
        """Recompute the background from what is there; its version rises."""
        ...

    def nearness(self, ids: Sequence[str]) -> Floats:
        """[n, n] cosines between entries: dense where all have one, else lexical."""
        ...

    def snapshot(self, path: Path) -> None:
        """Write everything a search depends on into one file."""
        ...


def check_entry(entry: Entry, encoder_id: str | None, dim: int | None) -> None:
    """Refuse a profile whose vectors cannot be compared with those of an index."""
    profile = entry.profile
    if profile.dense is None or encoder_id is None:
        return  # lexical only, on either side
    if profile.encoder_id != encoder_id:
        raise ProfileError(
            f"the profile of {entry.id!r} was made with the encoder {profile.encoder_id!r}, this index holds vectors "
            f"of {encoder_id!r}; make the profile again from samples",
            "other_encoder",
        )
    if profile.dense.shape != (dim,):
        raise ProfileError(
            f"the profile of {entry.id!r} has {len(profile.dense)} dense values, this index {dim}",
            "other_encoder",
        )
