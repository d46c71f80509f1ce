"""A version without samples takes its name out of what `auto` finds, and whoever publishes it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux.registry import Registry
from loramux.retrieval.store import ProfileStore
from loramux.retrieval.unfound import samples_note
from registry.uploads import put
from retrieval.pools import samples


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as made:
        ProfileStore.beside(made)
        yield made


def test_a_name_that_was_never_found_is_told_how_it_can_be(registry, tmp_path):
    note = samples_note(registry, put(registry, tmp_path, "a"))
    assert "does not find ann/sums" in note and "send the same again" in note


def test_a_name_that_was_found_until_now_is_told_by_which_version(registry, tmp_path):
    put(registry, tmp_path, "a", samples=samples("law"))
    put(registry, tmp_path, "b", samples=samples("law"))
    note = samples_note(registry, put(registry, tmp_path, "c"))
    assert "no longer finds ann/sums by those of ann/sums@2" in note
    again = put(registry, tmp_path, "c", samples=samples("law"))
    assert again.version == 3 and samples_note(registry, again) is None


def test_nothing_is_said_where_nothing_is_lost(registry, tmp_path):
    first = put(registry, tmp_path, "a", samples=samples("law"))
    assert samples_note(registry, first) is None
    assert samples_note(registry, put(registry, tmp_path, "a")) is None  # the version it was
    assert samples_note(registry, put(registry, tmp_path, "b", alias="canary")) is None
    put(registry, tmp_path, "c", name="other")
    assert samples_note(registry, registry.resolve("ann/sums", caller=None)) is None
