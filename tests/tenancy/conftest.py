"""A tenancy over a fresh database with clocks that tests turn: on SQLite, and on PostgreSQL where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from loramux.registry.db import open_database
from loramux.registry.schema import migrate
from loramux.tenancy import Tenancy
from postgres import fresh_schema, postgres_url  # noqa: F401
from tenancy.helpers import Clock


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with all tables, to copy: migrating anew for every test takes longer than the tests."""
    file = tmp_path_factory.mktemp("tenancy") / "registry.sqlite3"
    engine = open_database(f"sqlite:///{file}")
    migrate(engine)
    with engine.connect() as connection:  # all of it into the one file
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return file


@pytest.fixture
def database(request: pytest.FixtureRequest, migrated: Path, tmp_path: Path) -> str:
    """The URL of an empty database: SQLite, or what `helpers.both` asks for."""
    if getattr(request, "param", "sqlite") == "postgresql":
        return fresh_schema(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{shutil.copy(migrated, tmp_path / 'registry.sqlite3')}"


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    made = open_database(database)
    yield made
    made.dispose()


@pytest.fixture
def clock() -> Clock:
    """Monotonic seconds."""
    return Clock()


@pytest.fixture
def wall() -> Clock:
    """Seconds since 1970."""
    return Clock(1_800_000_000.0)


@pytest.fixture
def tenancy(engine: Engine, clock: Clock, wall: Clock) -> Tenancy:
    return Tenancy.open(engine, clock=clock, wall=wall)


@pytest.fixture
def second(engine: Engine, clock: Clock, wall: Clock) -> Iterator[Callable[[], Tenancy]]:
    """Opens the same database once more, as another process would."""
    engines: list[Engine] = []

    def open_again() -> Tenancy:
        engines.append(open_database(engine.url))
        return Tenancy.open(engines[-1], clock=clock, wall=wall)

    yield open_again
    for other in engines:
        other.dispose()
