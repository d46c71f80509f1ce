"""Registries to test: each claim on SQLite and on PostgreSQL.

Why templates: a schema is made once by its migrations (which have tests of their own) and then copied or emptied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from loramux.registry import Registry
from loramux.registry.db import open_database
from loramux.registry.schema import migrate
from loramux.registry.store import DATABASE
from postgres import fresh_schema, postgres_url

__all__ = ["postgres_url"]

KINDS = ("sqlite", "postgresql")
EMPTIED = (
    *("adapters", "versions", "version_files", "aliases", "shares", "blobs", "blob_leases"),
    *("scores", "generation"),
)


@pytest.fixture(params=KINDS)
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/empty.sqlite3"
    return fresh_schema(request.getfixturevalue("postgres_url"))


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    Registry.open(folder).close()
    return folder / DATABASE


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    url = fresh_schema(postgres_url)
    engine = open_database(url)
    migrate(engine)
    engine.dispose()
    return url


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """URL of an empty registry; None for the default one in tmp_path/registry."""
    if request.param == "sqlite":
        (tmp_path / "registry").mkdir()
        template = request.getfixturevalue("sqlite_template")
        shutil.copy(template, tmp_path / "registry" / DATABASE)
        return None
    url: str = request.getfixturevalue("postgres_template")
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(EMPTIED)} RESTART IDENTITY CASCADE"))
        connection.execute(text("INSERT INTO generation (id, value) VALUES (1, 1)"))
    engine.dispose()
    return url


@pytest.fixture
def open_registry(tmp_path: Path, database: str | None) -> Iterator[Callable[..., Registry]]:
    """Open the same registry as often as wanted; all are closed at the end."""
    opened: list[Registry] = []

    def make(**more: Any) -> Registry:
        opened.append(Registry.open(tmp_path / "registry", url=database, **more))
        return opened[-1]

    yield make
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Callable[..., Registry]) -> Registry:
    return open_registry()
