"""A tenancy over a fresh database with clocks that tests turn: on SQLite, and on PostgreSQL where it is installed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from loramux.registry.db import open_database
from loramux.tenancy import Tenancy
from postgres import postgres_url  # noqa: F401
from tenancy.clocks import Clock


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'registry.sqlite3'}"
        return
    server = request.getfixturevalue("postgres_url")
    yield from _own_database(server)


def _own_database(server: str) -> Iterator[str]:
    name = f"tenancy_{uuid.uuid4().hex[:12]}"
    admin = open_database(server).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield admin.url.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


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
