"""Registries to test: each claim on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux.registry import Registry
from postgres import fresh_schema, postgres_url

__all__ = ["postgres_url"]

KINDS = ("sqlite", "postgresql")


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest) -> str | None:
    """URL of an empty database; None for the default one of a folder."""
    if request.param == "sqlite":
        return None
    return fresh_schema(request.getfixturevalue("postgres_url"))


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
