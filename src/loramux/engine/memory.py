"""The books of the memory tier: contents by digest, their bytes, who pins them, when they were last used."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loramux.engine.content import Content


@dataclass(eq=False)
class Resident:
    content: Content
    nbytes: int
    pins: int = 0
    used: int = 0


class MemoryTier:
    """Counts and keeps; it decides nothing but which contents were used longest ago."""

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"memory_bytes must be 0 or more, got {limit}")
        self.limit = limit
        self.nbytes = 0
        self.evictions = 0
        self.residents: dict[str, Resident] = {}
        self._clock = 0

    @property
    def free(self) -> int:
        return self.limit - self.nbytes

    def put(self, content: Content) -> None:
        assert content.digest not in self.residents and content.nbytes <= self.free
        self.nbytes += content.nbytes
        self.residents[content.digest] = Resident(content, content.nbytes)
        self._touch(content.digest)

    def drop(self, digest: str) -> None:
        resident = self.residents.pop(digest)
        assert resident.pins == 0, f"{digest} is pinned {resident.pins} times"
        self.nbytes -= resident.nbytes
        self.evictions += 1

    def pin(self, digest: str) -> None:
        self.residents[digest].pins += 1
        self._touch(digest)

    def unpin(self, digest: str) -> None:
        assert self.residents[digest].pins > 0, f"{digest} was let go more often than pinned"
        self.residents[digest].pins -= 1
        self._touch(digest)

    def to_evict(self, nbytes: int, protected: Collection[str]) -> list[str] | None:
        """What has to go for so many bytes, the longest unused first; None if all that may go is not enough."""
        loose = [d for d, r in self.residents.items() if not r.pins and d not in protected]
        loose.sort(key=lambda digest: self.residents[digest].used)
        free, leaving = self.free, []
        for digest in loose:
            if free >= nbytes:
                break
            free += self.residents[digest].nbytes
            leaving.append(digest)
        return leaving if free >= nbytes else None

    def check_integrity(self) -> None:
        assert self.nbytes == sum(r.nbytes for r in self.residents.values()), self.nbytes
        assert 0 <= self.nbytes <= self.limit, (self.nbytes, self.limit)
        assert all(r.pins >= 0 for r in self.residents.values())

    def _touch(self, digest: str) -> None:
        self._clock += 1
        self.residents[digest].used = self._clock
