"""Stores to test, and folders to fill them from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.folders import Folders, Stores, make_store, write_lora
from loramux.engine.store import AdapterStore
from pico import build_pico


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Stores]:
    """Makes stores; in the end, without leases, their books must be at zero."""
    made: list[AdapterStore] = []

    def build(**budgets: int) -> AdapterStore:
        made.append(make_store(build_pico("llama"), **budgets))
        return made[-1]

    yield build
    for store in made:
        store.close()
        store.check_integrity()
        if store.stats().num_leases == 0:
            assert store.stats().num_slots_pinned == 0


@pytest.fixture
def store(make: Stores) -> AdapterStore:
    return make()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folder of the adapter of this number; copy before you edit."""
    root, model = tmp_path_factory.mktemp("loras"), build_pico("llama")

    def folder_of(number: int) -> Path:
        folder = root / str(number)
        return folder if folder.exists() else write_lora(model, folder, number)

    return folder_of
