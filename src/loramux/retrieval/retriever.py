"""Finds the adapters that fit a prompt, among those the caller may use.

Why the answer can be "none": in a pool without anything of the prompt's kind the nearest adapter is still a wrong one.
`min_score` is a threshold on the best lexical score, which tells the two cases apart better than the dense one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loramux.retrieval.background import Background, Query
from loramux.retrieval.calibrate import (
    MAX_PROFILES,
    AbstainAt,
    Calibration,
    calibrated_threshold,
)
from loramux.retrieval.encoder import Encoder
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.exact import ExactIndex
from loramux.retrieval.guard import check_centrality
from loramux.retrieval.index import Entry, Index
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.rank import Ranking, choose, hybrid
from loramux.retrieval.where import EVERYTHING, Allowed, Tags, Where

if TYPE_CHECKING:
    from loramux.retrieval.following import Follower

REFRESH_AT = (
    0.25  # ours: the background is made anew when the pool has grown or shrunk by a quarter
)


@dataclass(frozen=True)
class Hit:
    """One adapter that was found. dense: None where it or the retriever has no dense half."""

    id: str
    score: float
    lexical: float
    dense: float | None


@dataclass(frozen=True)
class Retrieved:
    """The hits, best first. abstained: there are none, and `reason` says why; the base answers alone."""

    hits: tuple[Hit, ...]
    abstained: bool = False
    reason: str = ""
    background: int = 0

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(hit.id for hit in self.hits)


class Retriever:
    """Profiles in an index, an encoder for prompts, and the rules of ranking.

    base: digest of the base model; with it only entries tagged with this base can be found, whatever the caller allows.
    min_score: least lexical cosine of the best candidate; None never abstains, `AbstainAt` takes it from the profiles,
    anew with each background.
    """

    def __init__(
        self,
        index: Index | None = None,
        encoder: Encoder | None = None,
        *,
        base: str | None = None,
        ranking: Ranking | None = None,
        min_score: float | AbstainAt | None = None,
        refresh_at: float | None = REFRESH_AT,
        reject_central: bool = True,
    ) -> None:
        if index is None:
            index = ExactIndex() if encoder is None else ExactIndex(encoder.id, encoder.dim)
        if not index.filters_first:
            raise RetrievalError(
                f"{type(index).__name__} ranks before it filters, which loses small tenants; use an index that applies "
                "`where` inside the search",
                "filters_late",
            )
        self.index, self.encoder = index, encoder
        self.ranking = Ranking() if ranking is None else ranking
        self.min_score, self.refresh_at, self.reject_central = min_score, refresh_at, reject_central
        self._calibrated: tuple[tuple[int, AbstainAt], Calibration] | None = None
        self._required = Where().tagged(base=base)

    @property
    def background(self) -> Background:
        return self.index.background

    def upsert(self, id: str, profile: Profile, *, owner: str, tags: Tags | None = None) -> None:
        """Add an adapter, or replace the one with this id."""
        self.upsert_all([Entry(id, profile, owner, tags or {})])

    def upsert_all(self, entries: Iterable[Entry], *, refresh: bool = True) -> None:
        """Add many at once; if one is refused none is added. refresh=False: the caller will `refresh_if_due`."""
        ready = list(entries)
        for entry in ready:
            self.check(entry)
        self.index.upsert(ready)
        if refresh:
            self.refresh_if_due()

    def check(self, entry: Entry) -> None:
        """Raise ProfileError if this entry would be refused."""
        self.index.check(entry)
        if self.reject_central:
            check_centrality(entry, self.background)

    def delete(self, id: str) -> bool:
        """Forget an adapter; False if it was not there."""
        return self.delete_all([id]) > 0

    def delete_all(self, ids: Sequence[str]) -> int:
        """Forget these at once; returns how many were there."""
        found = self.index.delete(ids)
        self.refresh_if_due()
        return found

    def refresh(self) -> Background:
        """Recompute how common words are and where the middle of the pool is. All scores may change a little."""
        return self.index.refresh()

    def query(self, prompt: str) -> Query:
        """The prompt as vectors: all that costs an encoder call."""
        dense = None if self.encoder is None else self.encoder.encode([prompt])[0]
        return Query.of(prompt, dense)

    def profile(self, samples: Sequence[str], seed: int = 0) -> Profile:
        """A profile for this retriever's index."""
        return make_profile(samples, self.encoder, seed)

    def retrieve(
        self,
        prompt: str | Query,
        k: int = 3,
        *,
        allowed: Allowed,
        masked: AbstractSet[str] = frozenset(),
        min_score: float | None = None,
    ) -> Retrieved:
        """The k best of `allowed` for a raw prompt (no template around it).

        allowed: ids, a `Where`, or a function of an id (asked for every entry: for small pools). masked: ids left out
        besides, for measuring. min_score: in place of the retriever's own.
        """
        if k < 1:
            raise RetrievalError(f"k must be at least 1, got {k}")
        query = self.query(prompt) if isinstance(prompt, str) else prompt
        where, ids = self._condition(allowed, masked)
        scored = self.index.search(query, where, ids)
        version = self.background.version
        if len(scored) == 0:
            return Retrieved((), True, "no adapter may be used", version)
        limit = self.threshold() if min_score is None else min_score
        best = float(scored.lexical.max())
        if limit is not None and best < limit:
            reason = f"best lexical score {best:.3f} is below {limit:.3f}"
            return Retrieved((), True, reason, version)
        scores = hybrid(scored, self.ranking.dense_weight)
        order = choose(scored, scores, k, self.ranking, self.index.nearness)
        return Retrieved(tuple(_hit(scored, scores, i) for i in order), background=version)

    def threshold(self) -> float | None:
        """The least lexical score that is in force now; None: whatever is best is found."""
        if not isinstance(self.min_score, AbstainAt):
            return self.min_score
        key, known = (self.background.version, self.min_score), self._calibrated
        if known is None or known[0] != key:
            # Two threads may both work it out: they find the same.
            last = None if known is None else known[1]
            profiles = self.index.profiles(MAX_PROFILES)
            found = calibrated_threshold(profiles, self.background, self.min_score, last)
            self._calibrated = known = (key, found)
        return known[1].min_score

    def follow(self, registry: Any, caller: str | None = None, **options: Any) -> Follower:
        """Keep this retriever in step with a registry: `follow(self, registry, caller)`."""
        from loramux.retrieval.following import follow

        return follow(self, registry, caller, **options)

    def _condition(
        self, allowed: Allowed, masked: AbstractSet[str]
    ) -> tuple[Where, AbstractSet[str] | None]:
        if isinstance(allowed, Where):
            where = replace(allowed, clauses=allowed.clauses + self._required.clauses)
            ids: AbstractSet[str] | None = None
            if masked:
                ids = frozenset(self.index.ids(where)) - masked
            return where, ids
        if callable(allowed):
            ids = frozenset(id for id in self.index.ids(self._required) if allowed(id))
        else:
            ids = allowed
        return self._required, ids - masked if masked else ids

    def refresh_if_due(self) -> None:
        """`refresh` if the pool has grown or shrunk enough since the last one."""
        if self.refresh_at is None:
            return
        known, now = self.background.num_profiles, self.index.count(EVERYTHING)
        if now and abs(now - known) > self.refresh_at * known:
            self.refresh()


def _hit(scored: Any, scores: Any, i: int) -> Hit:
    dense = None if scored.dense is None else float(scored.dense[i])
    dense = None if dense is None or dense != dense else dense
    return Hit(scored.id(i), float(scores[i]), float(scored.lexical[i]), dense)
