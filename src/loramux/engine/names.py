"""Which adapter a name stands for, and which contents still have a name. Lookups and counts, never scans."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from loramux.engine.loader import Job
from loramux.engine.sources import Identity, identity_of

MOST_COMPARED = 1000  # names looked through for a hint


@dataclass(eq=False)
class Entry:
    """What a name stands for now. `digest`: the content last read from the folder (or given), under `identity`."""

    name: str
    folder: Path | None
    digest: str | None = None
    identity: Identity = ()
    is_stale: bool = False  # the folder has changed since
    job: Job | None = None

    def look(self) -> None:
        """Notice that the folder has changed since it was read."""
        if self.folder is not None and self.digest is not None:
            self.is_stale = identity_of(self.folder) != self.identity


class Names:
    """Entries by name. Contents given from memory, which no folder could bring back, are counted apart."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._named: Counter[str] = Counter()
        self._given: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, list(self.entries)[:MOST_COMPARED], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"no adapter is named {name!r}{hint}; register or add it first ({len(self.entries)} are known)"
            )
        return entry

    def put(self, entry: Entry) -> str | None:
        """Give the name to another entry; returns the digest it stood for."""
        before = self.remove(entry.name) if entry.name in self.entries else None
        self.entries[entry.name] = entry
        self._count(entry, 1)
        return before

    def remove(self, name: str) -> str | None:
        """Take a name back; returns the digest it stood for."""
        entry = self[name]
        del self.entries[name]
        self._count(entry, -1)
        return entry.digest

    def was_read(self, entry: Entry, digest: str, identity: Identity) -> str | None:
        """Note what an entry's folder holds; returns the digest it stood for. Ignores entries that lost their name."""
        before = entry.digest
        if self.entries.get(entry.name) is not entry:
            return None
        self._count(entry, -1)
        entry.digest, entry.identity, entry.is_stale = digest, identity, False
        self._count(entry, 1)
        entry.look()
        return before

    def is_named(self, digest: str) -> bool:
        return digest in self._named

    @property
    def given(self) -> list[str]:
        """Digests of contents that must stay in memory while they have a name."""
        return list(self._given)

    def check_integrity(self) -> None:
        named = Counter(e.digest for e in self.entries.values() if e.digest is not None)
        given = Counter(e.digest for e in self.entries.values() if e.digest and e.folder is None)
        assert named == self._named, (named, self._named)
        assert given == self._given, (given, self._given)

    def _count(self, entry: Entry, change: int) -> None:
        if entry.digest is None:
            return
        for counter in (self._named, *([self._given] if entry.folder is None else [])):
            counter[entry.digest] += change
            if not counter[entry.digest]:
                del counter[entry.digest]
