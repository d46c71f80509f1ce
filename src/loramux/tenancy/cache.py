"""Who a secret belongs to, from memory: what `authenticate` looks at on every request.

Why polled: a revocation must reach every process within a second, and a database call per request would cost more than
all else at the door. One small question ("which generation?") at most every half second finds any change; only changed
rows are read then. If the database does not answer for a second, nobody is let in: a key may have been revoked.

Expiry looks at two clocks. The wall clock says when a key ends; the monotonic clock remembers how long that was when
the key was first seen, so that turning the clock back does not make a key live longer.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, select

from loramux.errors import LoramuxError
from loramux.registry.db import clear_errors, reading
from loramux.tenancy import tables
from loramux.tenancy.caller import Caller
from loramux.tenancy.errors import AuthError
from loramux.tenancy.records import Tenant, as_tenant
from loramux.tenancy.secret import hash_of, key_id_of

log = logging.getLogger(__name__)

POLL_S = 0.5
MAX_AGE_S = 1.0
PATIENCE_S = 2.0
GLANCE_S = (
    0.05  # waited for news while what is known is young enough: mostly they are there by then
)
# Compared with when no key has the id: the same work, and nothing hashes to it.
_NOBODY = "x" * 64
INVALID = "this API key is not valid: it is unknown, expired or revoked"
NO_KEY = "no API key was given; send it as: Authorization: Bearer KEY"


@dataclass(frozen=True)
class _Entry:
    """A key as it was read. deadline: when it ends by the monotonic clock."""

    secret_hash: str
    caller: Caller
    expires_at: float | None
    deadline: float | None
    is_usable: bool  # neither revoked nor of a disabled tenant


@dataclass(frozen=True)
class _Question:
    """To the database, by a thread of its own."""

    began: float
    is_over: threading.Event


class KeyCache:
    """All keys of all tenants. clock: monotonic seconds; wall: seconds since 1970. asks_beside: see the file."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
        asks_beside: bool = False,
    ) -> None:
        self._engine, self._clock, self._wall, self._poll_s = engine, clock, wall, poll_s
        self._asks_beside = asks_beside
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._question: _Question | None = None
        self._entries: dict[str, _Entry] = {}
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._seen = -1  # generation
        self._asked_at = self._known_at = -float("inf")

    def authenticate(self, secret: str | None) -> Caller:
        if not secret:
            raise AuthError(NO_KEY)
        self._refresh()
        key_id = key_id_of(secret)
        entry = self._entries.get(key_id) if key_id is not None else None
        given = hash_of(secret) if key_id is not None else _NOBODY
        is_same = hmac.compare_digest(given, entry.secret_hash if entry else _NOBODY)
        if entry is None or not is_same or not entry.is_usable or self._is_over(entry):
            log.info("a key was refused: %s", key_id or "not of our shape")
            raise AuthError(INVALID)
        return entry.caller

    def look_again(self) -> None:
        """Something was changed here: every request from now on sees it."""
        # Under the lock: another thread may be half-way through a look that began before the change.
        with self._lock:
            self._asked_at = self._clock()
            self._ask(self._asked_at)

    def tenants(self) -> Mapping[str, Tenant]:
        """All tenants as of the last look, by name."""
        self._refresh()
        return self._tenants

    @property
    def generation(self) -> int:
        """Of the last look; it rose if a tenant or key changed."""
        return self._seen

    def _is_over(self, entry: _Entry) -> bool:
        if entry.expires_at is None:
            return False
        if self._wall() >= entry.expires_at:
            return True
        if entry.deadline is None:  # it was read while the wall clock was ahead
            key_id = entry.caller.key_id
            with (
                self._lock
            ):  # or it could put back what a look that goes on meanwhile has taken away
                self._entries[key_id] = entry = self._entry(key_id)
            if not entry.is_usable:
                return True
        return entry.deadline is None or self._clock() >= entry.deadline

    # --- Keeping up -----------------------------------------------------------------------------

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._asked_at < self._poll_s and now - self._known_at < MAX_AGE_S:
            return
        if self._asks_beside:
            self._refresh_beside(now)
        else:
            self._refresh_here(now)
        if self._clock() - self._known_at >= MAX_AGE_S:
            raise AuthError(
                "keys cannot be checked at the moment; try again",
                code="auth_unavailable",
                status=503,
            )

    def _refresh_here(self, now: float) -> None:
        # One thread asks; the others go on with what is known while it is young enough.
        if self._lock.acquire(blocking=now - self._known_at >= MAX_AGE_S):
            try:
                self._ask_if_due()
            finally:
                self._lock.release()

    def _refresh_beside(self, now: float) -> None:
        with self._starting:
            question = self._question
            if question is None and now - self._asked_at >= self._poll_s:
                question = self._question = _Question(now, threading.Event())
                thread = threading.Thread(target=self._answer, args=(question,), daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has no thread left
                    self._question = question = None
                    log.exception("keys cannot be read")
        if question is not None:
            patience = PATIENCE_S if now - self._known_at >= MAX_AGE_S else GLANCE_S
            question.is_over.wait(max(0.0, patience - (now - question.began)))

    def _answer(self, question: _Question) -> None:
        try:
            with self._lock:
                self._ask_if_due()
        except Exception:
            log.exception("keys cannot be read")
        finally:
            self._question = None
            question.is_over.set()

    def _ask_if_due(self) -> None:
        now = self._clock()
        if now - self._asked_at >= self._poll_s:
            self._asked_at = now
            self._ask(now)

    def _ask(self, now: float) -> None:
        try:
            with clear_errors(), self._engine.connect() as connection:
                is_new = tables.current(connection) != self._seen
            if is_new:
                with reading(self._engine) as connection:
                    self._read(connection)
        except LoramuxError as error:
            log.error("keys cannot be read: %s", error)
            return
        self._known_at = now

    def _read(self, connection: Connection) -> None:
        """Rows of the generations that were not seen yet."""
        generation = tables.current(connection)
        new_tenants = connection.execute(
            select(tables.tenants).where(tables.tenants.c.changed > self._seen)
        ).all()
        new_keys = connection.execute(
            select(tables.keys).where(tables.keys.c.changed > self._seen)
        ).all()
        touched = {row.id for row in new_keys}
        for row in new_keys:
            self._rows[row.id] = row._asdict()
        if new_tenants:
            names = {row.name for row in new_tenants}
            self._tenants |= {row.name: as_tenant(row._asdict()) for row in new_tenants}
            touched |= {key for key, held in self._rows.items() if held["tenant"] in names}
        for key_id in touched:
            self._entries[key_id] = self._entry(key_id)
        self._seen = generation

    def _entry(self, key_id: str) -> _Entry:
        row = self._rows[key_id]
        tenant = self._tenants[row["tenant"]]
        caller = Caller(
            tenant=tenant.name,
            key_id=key_id,
            scopes=frozenset(row["scopes"].split()),
            weight=tenant.weight,
            limits=tenant.limits,
            salt=tenant.salt,
        )
        is_usable = row["revoked_at"] is None and tenant.disabled_at is None
        deadline = self._deadline(key_id, row["expires_at"])
        return _Entry(row["secret_hash"], caller, row["expires_at"], deadline, is_usable)

    def _deadline(self, key_id: str, expires_at: float | None) -> float | None:
        """None for a key that the wall clock says is over: should that clock be wrong, there is no telling when."""
        left = 0.0 if expires_at is None else expires_at - self._wall()
        old = self._entries.get(key_id)
        known = old.deadline if old is not None and old.expires_at == expires_at else None
        if left <= 0:
            return known
        deadline = self._clock() + left
        return deadline if known is None else min(known, deadline)
