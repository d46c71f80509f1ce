"""`Tenancy`: tenants, keys, quotas and audit over one database."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.dialects import postgresql, sqlite

from loramux.registry import tables as registry_tables
from loramux.registry.db import begin, reading
from loramux.registry.schema import migrate
from loramux.tenancy import tables
from loramux.tenancy.audit import Audit
from loramux.tenancy.cache import POLL_S, KeyCache
from loramux.tenancy.keys import Keys
from loramux.tenancy.quotas import Quotas, Stored, Usage
from loramux.tenancy.tenants import Tenants


class Tenancy:
    """Open one per process. Call `flush` now and then, and `close` at the end: both write the ledger."""

    def __init__(
        self,
        engine: Engine,
        cache: KeyCache,
        quotas: Quotas,
        audit: Audit,
        wall: Callable[[], float],
    ):
        self.database, self._wall = engine, wall
        self.cache = cache
        self.quotas = quotas
        self.audit = audit
        self.tenants = Tenants(engine, audit, cache, wall=wall)
        self.keys = Keys(engine, audit, cache, wall=wall)

    @classmethod
    def open(
        cls,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
        stored: Stored | None = None,
        asks_beside: bool = False,
    ) -> Tenancy:
        """engine: `registry.db.open_database(url)`. stored: bytes and adapters that a tenant keeps, by default those
        of the registry in the same database. asks_beside: keys are read by a thread of their own, for an event loop."""
        migrate(engine)
        cache = KeyCache(engine, clock=clock, wall=wall, poll_s=poll_s, asks_beside=asks_beside)
        quotas = Quotas(clock=clock, stored=stored or (lambda tenant: kept_by(engine, tenant)))
        return cls(engine, cache, quotas, Audit(engine, wall=wall), wall)

    def flush(self) -> None:
        """Add what was settled since the last call to the ledger; it blocks, so call it from a thread."""
        taken = self.quotas.take_unflushed()
        if not taken:
            return
        day = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%d")
        try:
            with begin(self.database) as connection:
                _add(connection, day, taken)
        except BaseException:
            self.quotas.give_back(taken)
            raise

    def ledger(self, tenant: str, *, day: str | None = None) -> Usage:
        """What was flushed for a tenant by all processes, ever or on one day (UTC, 2026-01-31)."""
        table = tables.usage
        query = select(func.sum(table.c.requests), func.sum(table.c.tokens))
        query = query.where(table.c.tenant == tenant)
        if day is not None:
            query = query.where(table.c.day == day)
        with reading(self.database) as connection:
            requests, tokens = connection.execute(query).one()
        return Usage(int(requests or 0), int(tokens or 0))

    def close(self) -> None:
        """Write what is left. The engine stays open: it belongs to whoever opened it."""
        self.flush()

    def __enter__(self) -> Tenancy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kept_by(engine: Engine, tenant: str) -> tuple[int, int]:
    """Bytes and number of the versions that a tenant has in the registry and has not deleted."""
    adapters, versions = registry_tables.adapters, registry_tables.versions
    query = (
        select(func.sum(versions.c.num_bytes), func.count())
        .select_from(versions)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(adapters.c.tenant == tenant, versions.c.deleted_at.is_(None))
    )
    with reading(engine) as connection:
        num_bytes, count = connection.execute(query).one()
    return int(num_bytes or 0), int(count)


def _add(connection: Connection, day: str, taken: Mapping[str, Usage]) -> None:
    """All rows by one statement: one each kept the interpreter from the requests for a third of a second."""
    table = tables.usage
    dialect: Any = {"sqlite": sqlite, "postgresql": postgresql}[connection.dialect.name]
    new = dialect.insert(table)
    more = {name: table.c[name] + new.excluded[name] for name in ("requests", "tokens")}
    rows = [
        {"tenant": tenant, "day": day, "requests": used.requests, "tokens": used.tokens}
        for tenant, used in sorted(taken.items())  # one order, or two processes wait for each other
    ]
    connection.execute(new.on_conflict_do_update(index_elements=["tenant", "day"], set_=more), rows)
