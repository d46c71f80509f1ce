"""Keeps a retriever in step with a registry: what `latest` leads to can be found, under `tenant/name@version`.

Why `latest` only: five versions of one adapter would fill the hits with near copies. Who wants an adapter found by
prompts points `latest` at it; who takes the alias away, or the profile, takes it out.

Owner, shares and base become marks, so `Where.visible_to(caller, base)` means what the registry means.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Select, select

from loramux.registry.db import reading
from loramux.registry.names import LATEST
from loramux.registry.read import may_use
from loramux.registry.tables import adapters, aliases, current_generation, shares, versions
from loramux.retrieval.errors import ProfileError
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.store import read_bodies
from loramux.retrieval.tables import profiles

if TYPE_CHECKING:
    from loramux.registry import Registry
    from loramux.retrieval.retriever import Retriever

log = logging.getLogger(__name__)
_MANY = 500  # profiles held beside the index while it is filled


@dataclass(frozen=True)
class Fact:
    """What the index should know of one adapter, short of its profile."""

    ref: str
    version_id: int
    tenant: str
    base: str
    method: str
    readers: tuple[str, ...]
    encoder_id: str
    sha256: str

    @property
    def tags(self) -> dict[str, str | tuple[str, ...]]:
        return {"base": self.base, "method": self.method, "readers": self.readers}


class Follower:
    """`sync` after every change, or now and then: it costs one small query while nothing has changed."""

    def __init__(self, retriever: Retriever, registry: Registry, caller: str | None) -> None:
        self.retriever, self.registry, self.caller = retriever, registry, caller
        self.generation = -1
        self._known: dict[str, Fact] = {}
        self._syncing = threading.Lock()

    def sync(self) -> bool:
        """Bring the retriever up to date; False if it was."""
        with self._syncing, reading(self.registry.database) as connection:
            now = current_generation(connection)
            if now == self.generation:
                return False
            wanted = read_facts(connection, self._encoder_id, self.caller)
            changed = [fact for ref, fact in wanted.items() if self._known.get(ref) != fact]
            # New ones first: while a new version takes over, one of the two can be found.
            for start in range(0, len(changed), _MANY):
                self._add(connection, changed[start : start + _MANY])
            gone = [ref for ref in self._there(connection) if ref not in wanted]
            self.retriever.delete_all(gone)
            for ref in gone:
                self._known.pop(ref, None)
            self.generation = now
            return True

    def _there(self, connection: Connection) -> list[str]:
        """What may have to go. An index that outlives this process (Qdrant) holds what was withdrawn meanwhile; what
        this registry never had a name for was put there by somebody else."""
        if self.generation == -1 and self.caller is None:  # one caller does not see everything
            rows = connection.execute(select(adapters.c.tenant, adapters.c.name))
            ours = {f"{tenant}/{name}" for tenant, name in rows}
            return [ref for ref in self.retriever.index.ids() if ref.rpartition("@")[0] in ours]
        return list(self._known)

    @property
    def _encoder_id(self) -> str | None:
        encoder = self.retriever.encoder
        return None if encoder is None else encoder.id

    def _add(self, connection: Connection, facts: list[Fact]) -> None:
        bodies = dict(read_bodies(connection, [(f.version_id, f.encoder_id) for f in facts]))
        entries = {f.ref: self._entry(f, bodies.get((f.version_id, f.encoder_id))) for f in facts}
        self.retriever.upsert_all([e for e in entries.values() if e is not None], refresh=False)
        refused = [ref for ref, entry in entries.items() if entry is None]
        self.retriever.index.delete(refused)
        self._known.update((fact.ref, fact) for fact in facts)

    def _entry(self, fact: Fact, body: bytes | None) -> Entry | None:
        """None for a profile that cannot be used: one bad row must not keep the others out."""
        try:
            if body is None:
                raise ProfileError("its profile is gone")
            profile = Profile.from_bytes(body)
            if fact.encoder_id != (self._encoder_id or ""):
                profile = profile.lexical_only()
            entry = Entry(fact.ref, profile, fact.tenant, fact.tags)
            self.retriever.check(entry)
        except ProfileError as error:
            log.warning("%s cannot be retrieved: %s", fact.ref, error)
            return None
        return entry


def follow(retriever: Retriever, registry: Registry, caller: str | None = None) -> Follower:
    """Fill a retriever from a registry and return what keeps it in step. caller: only what this tenant may use."""
    follower = Follower(retriever, registry, caller)
    follower.sync()
    return follower


def read_facts(
    connection: Connection, encoder_id: str | None, caller: str | None = None
) -> dict[str, Fact]:
    """What `latest` leads to and has a profile, by ref; of several profiles the encoder's own."""
    readers = defaultdict(list)
    for adapter_id, tenant in connection.execute(select(shares.c.adapter_id, shares.c.tenant)):
        readers[adapter_id].append(tenant)
    found: dict[str, Fact] = {}
    for row in connection.execute(_query(caller)):
        ref = f"{row.tenant}/{row.name}@{row.version}"
        if ref in found and row.encoder_id != (encoder_id or ""):
            continue
        found[ref] = Fact(
            ref,
            row.id,
            row.tenant,
            row.base_digest or "",
            row.method,
            tuple(sorted(readers[row.adapter_id])),
            row.encoder_id,
            row.sha256,
        )
    return found


def _query(caller: str | None) -> Select[Any]:
    latest = (aliases.c.adapter_id == versions.c.adapter_id) & (
        aliases.c.version == versions.c.version
    )
    return (
        select(
            *(
                versions.c[name]
                for name in ("id", "adapter_id", "version", "base_digest", "method")
            ),
            adapters.c.tenant,
            adapters.c.name,
            profiles.c.encoder_id,
            profiles.c.sha256,
        )
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .join(aliases, latest)
        .join(profiles, profiles.c.version_id == versions.c.id)
        .where(aliases.c.alias == LATEST, versions.c.deleted_at.is_(None), may_use(caller))
        .order_by(versions.c.id, profiles.c.encoder_id)
    )
