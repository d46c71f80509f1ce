"""API keys: made, rotated, revoked, listed. `authenticate` is the cache's (cache.py) and asks no database.

Why a key shows its secret once: only the hash is kept, so nobody who reads the database or a backup can use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update

from loramux.registry.db import begin, reading
from loramux.tenancy import tables
from loramux.tenancy.audit import Audit
from loramux.tenancy.cache import KeyCache
from loramux.tenancy.caller import Caller, check_scopes
from loramux.tenancy.errors import TenancyError
from loramux.tenancy.records import coded
from loramux.tenancy.records import get as get_tenant
from loramux.tenancy.secret import hash_of, new_secret

MAX_LABEL = 200
OVERLAP_S = 24 * 3600.0  # ours: a day to put the new key everywhere


@dataclass(frozen=True)
class Key:
    """What is known of a key without its secret. Times are seconds since 1970."""

    id: str
    tenant: str
    label: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    replaced_by: str | None

    def state(self, now: float) -> str:
        """ "valid", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "valid"

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "tenant": self.tenant,
            "label": self.label,
            "scopes": sorted(self.scopes),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "revoked_at": self.revoked_at,
            "replaced_by": self.replaced_by,
        }


@dataclass(frozen=True)
class NewKey:
    """A key and, this once, its secret."""

    key: Key
    secret: str = field(repr=False)


class Keys:
    """cache: the one that this process authenticates with; it learns of changes made here at once."""

    def __init__(
        self,
        engine: Engine,
        audit: Audit,
        cache: KeyCache,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._audit, self._cache, self._wall = engine, audit, cache, wall

    def authenticate(self, secret: str | None) -> Caller:
        """Who brings this secret, or AuthError; sees what other processes changed within a second."""
        return self._cache.authenticate(secret)

    def create(
        self,
        tenant: str,
        scopes: Iterable[str],
        *,
        label: str = "",
        expires_in_s: float | None = None,
        actor: str,
    ) -> NewKey:
        """A new key of an existing tenant; expires_in_s None: it is valid until it is revoked."""
        allowed = check_scopes(scopes)
        _check_label(label)
        expires_at = None
        if expires_in_s is not None:
            expires_at = self._wall() + _positive("the time to expiry", expires_in_s)
        with begin(self._engine) as connection:
            changed = tables.bump(connection)
            get_tenant(connection, tenant)
            made = self._insert(connection, tenant, allowed, label, expires_at, changed)
            detail = {"tenant": tenant, "scopes": sorted(allowed), "expires_at": expires_at}
            self._audit.write(connection, actor, "key.create", made.key.id, detail)
        self._cache.look_again()
        return made

    def rotate(self, key_id: str, *, overlap_s: float = OVERLAP_S, actor: str) -> NewKey:
        """A new key like this one, which itself stays valid for `overlap_s` seconds more, or less if it ends sooner."""
        if overlap_s < 0:
            raise TenancyError(f"the overlap must be 0 seconds or more, got {overlap_s}")
        now = self._wall()
        with begin(self._engine) as connection:
            changed = tables.bump(connection)
            old = _get(connection, key_id)
            if old.state(now) != "valid" or old.replaced_by is not None:
                why = "replaced" if old.replaced_by else old.state(now)
                raise TenancyError(f"key {key_id} is {why} and cannot be rotated; create a new one")
            length = None if old.expires_at is None else old.expires_at - old.created_at
            expires_at = None if length is None else now + length
            made = self._insert(connection, old.tenant, old.scopes, old.label, expires_at, changed)
            ends = now + overlap_s
            if old.expires_at is not None:
                ends = min(ends, old.expires_at)
            _update(connection, key_id, changed, expires_at=ends, replaced_by=made.key.id)
            detail = {"new": made.key.id, "old_expires_at": ends}
            self._audit.write(connection, actor, "key.rotate", key_id, detail)
        self._cache.look_again()
        return made

    def revoke(self, key_id: str, *, actor: str) -> Key:
        """Not valid from now on: here at once, in other processes within a second. Twice is no error."""
        with begin(self._engine) as connection:
            changed = tables.bump(connection)
            key = _get(connection, key_id)
            if key.revoked_at is None:
                _update(connection, key_id, changed, revoked_at=self._wall())
                self._audit.write(connection, actor, "key.revoke", key_id, {"tenant": key.tenant})
                key = _get(connection, key_id)
        self._cache.look_again()
        return key

    def list(self, tenant: str | None = None) -> list[Key]:
        """All keys, or a tenant's, oldest first; TenancyError for a tenant that does not exist."""
        query = select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        with reading(self._engine) as connection:
            if tenant is not None:
                get_tenant(connection, tenant)
                query = query.where(tables.keys.c.tenant == tenant)
            return [as_key(row._asdict()) for row in connection.execute(query)]

    def _insert(
        self,
        connection: Connection,
        tenant: str,
        scopes: frozenset[str],
        label: str,
        expires_at: float | None,
        changed: int,
    ) -> NewKey:
        key_id, secret = new_secret()
        key = Key(key_id, tenant, label, scopes, self._wall(), expires_at, None, None)
        row = {**key.to_dict(), "scopes": " ".join(sorted(scopes))}
        row |= {"secret_hash": hash_of(secret), "changed": changed}
        connection.execute(insert(tables.keys).values(**row))
        return NewKey(key, secret)


def as_key(row: Mapping[str, Any]) -> Key:
    return Key(
        id=row["id"],
        tenant=row["tenant"],
        label=row["label"],
        scopes=frozenset(row["scopes"].split()),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        replaced_by=row["replaced_by"],
    )


def _get(connection: Connection, key_id: str) -> Key:
    row = connection.execute(select(tables.keys).where(tables.keys.c.id == key_id)).first()
    if row is None:
        raise coded(
            "key_not_found",
            f"there is no key {key_id!r:.40}; give the id that `loramux key list` shows",
        )
    return as_key(row._asdict())


def _update(connection: Connection, key_id: str, changed: int, **values: Any) -> None:
    where = tables.keys.c.id == key_id
    connection.execute(update(tables.keys).where(where).values(changed=changed, **values))


def _check_label(label: str) -> None:
    if len(label) > MAX_LABEL or not label.isprintable():
        raise TenancyError(
            f"a label has at most {MAX_LABEL} printable characters, got {len(label)}: {label[:40]!r}"
        )


def _positive(what: str, seconds: float) -> float:
    if not 0 < seconds < 1e10:
        raise TenancyError(f"{what} must be a positive number of seconds, got {seconds}")
    return seconds
