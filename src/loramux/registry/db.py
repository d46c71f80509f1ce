"""The database: one set of tables on SQLite or PostgreSQL, opened with the guarantees the registry builds on.

Why not leave it to defaults: SQLite's driver starts transactions late and does not check foreign keys; a lost commit
or a lock found half-way through a change is what a registry must not have. Other packages add tables to `metadata`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from loramux.errors import require
from loramux.registry.errors import Conflict, RegistryError, StorageError

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

LOCK_WAIT_S = 30
_WRITES = "loramux_writes"


def open_database(url: str | URL) -> Engine:
    """An engine for `sqlite:///file` or `postgresql://...`; nothing is connected to yet."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise RegistryError(
            f"{str(url)!r:.80} is not a database URL; "
            "allowed: sqlite:////folder/registry.sqlite3 or postgresql://user@host/database",
            code="bad_url",
        ) from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        require("psycopg", "postgres", "a registry on PostgreSQL")
        server = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(server, pool_pre_ping=True, pool_timeout=LOCK_WAIT_S)
        event.listen(engine, "connect", _prepare_postgres)
        return engine
    if kind == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise RegistryError(
                "a registry in memory would be lost and is private to one thread; name a file",
                code="bad_url",
            )
        engine = create_engine(
            parsed, connect_args={"timeout": LOCK_WAIT_S}, pool_timeout=LOCK_WAIT_S
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    raise RegistryError(
        f"a registry lives in sqlite or postgresql, not in {kind!r}", code="bad_url"
    )


@contextlib.contextmanager
def begin(engine: Engine) -> Iterator[Connection]:
    """One writing transaction: committed at the end, rolled back on any exception.

    On SQLite the lock is taken at once, so what was read inside is still true when it is written.
    """
    with clear_errors(), engine.connect() as plain:
        connection = plain.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One snapshot: several statements see the same state, and block nobody."""
    with clear_errors(), engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        with connection.begin():
            yield connection


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Errors of the database as ours: a code, no SQL, no path."""
    try:
        yield
    except DBAPIError as error:
        raise _explained(error) from error
    except PoolTimeout as error:
        raise StorageError(
            f"every connection to the registry's database was in use for {LOCK_WAIT_S} s; nothing was changed, repeat "
            "it",
            code="database_busy",
        ) from error


def _explained(error: DBAPIError) -> Exception:
    text = str(error.orig).lower()
    for marks, code, message in _REASONS:
        if any(mark in text for mark in marks):
            return StorageError(message, code=code)
    if "deadlock" in text or "could not serialize" in text:
        return Conflict("two changes met in the database; nothing was changed, repeat it")
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return StorageError(
            "the registry's database cannot be used "
            f"({type(error.orig).__name__}); check that it runs and may be written",
            code="database_unavailable",
        )
    return error


_REASONS = (
    (
        ("not a database", "malformed"),
        "database_damaged",
        "the registry's database file is damaged or is no SQLite database; restore it from a backup",
    ),
    (
        ("database or disk is full", "no space left", "disk full"),
        "storage_full",
        "the registry's disk is full; nothing was changed, free some space and repeat",
    ),
    (
        ("readonly database", "read-only", "attempt to write a readonly"),
        "storage_read_only",
        "the registry's database is read-only; nothing was changed, make it writable and repeat",
    ),
    (
        ("database is locked", "lock timeout"),
        "database_busy",
        f"the registry's database was locked for {LOCK_WAIT_S} s; nothing was changed, repeat it",
    ),
)


def _prepare_postgres(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:  # without it a writer that hangs holds all others for ever
        cursor.execute(f"SET lock_timeout = {LOCK_WAIT_S * 1000:.0f}")
    connection.commit()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, see _begin_sqlite
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_S * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # In WAL mode anything less than FULL may lose the last commits in a power cut.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
