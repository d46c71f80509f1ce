"""Versions never change: the databases themselves refuse, whoever asks; aliases move by compare-and-swap; deleting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from loramux.registry import Conflict, NotFound, Registry, RegistryError
from loramux.registry.db import begin
from registry.uploads import put

DIGEST = "f" * 64
REFUSED = {
    "digest": f"UPDATE versions SET digest = '{DIGEST}'",
    "base": "UPDATE versions SET base_digest = NULL",
    "number": "UPDATE versions SET version = version + 10",
    "metadata": "UPDATE versions SET metadata = '{}' WHERE version = 1",
    "row": "DELETE FROM versions WHERE version = 2",
    "bytes of a file": f"UPDATE version_files SET sha256 = '{DIGEST}'",
    "name of a file": "UPDATE version_files SET path = 'x' WHERE path = 'adapter_config.json'",
    "file less": "DELETE FROM version_files",
    "file more": f"INSERT INTO version_files VALUES (1, 'more.json', '{DIGEST}', 1)",
    "deleted back": "UPDATE versions SET deleted_at = NULL WHERE version = 3",
    "deleted twice": "UPDATE versions SET deleted_at = 5 WHERE version = 3",
    "deleted with alias": "UPDATE versions SET deleted_at = 5 WHERE version = 2",
    "alias to deleted": "UPDATE aliases SET version = 3",
    "alias to nothing": "UPDATE aliases SET version = 77",
    "alias made to deleted": "INSERT INTO aliases VALUES (1, 'x', 3, 1.0, 't')",
    "number again": "UPDATE adapters SET last_version = 0",
    "name": "DELETE FROM adapters",
    "owner": "UPDATE adapters SET tenant = 'eve'",
    "other name": "UPDATE adapters SET name = 'other'",
    "second live one": (
        "INSERT INTO versions SELECT 99, adapter_id, 99, digest, base_digest, method, servability, "
        "max_rank, num_bytes, num_files, metadata, provenance, search_text, created_at, created_by, "
        "NULL, NULL FROM versions WHERE version = 1"
    ),
    "generation row": "INSERT INTO generation VALUES (2, 7)",
}
REFUSED_BY_SQLITE = {
    "replaced name": "INSERT OR REPLACE INTO adapters VALUES (1, 'eve', 'sums', 3, 1.0)",
    "replaced owner's name": "INSERT OR REPLACE INTO adapters VALUES (7, 'ann', 'sums', 0, 1.0)",
    "replaced version": (
        "INSERT OR REPLACE INTO versions SELECT id, adapter_id, version, "
        f"'{DIGEST}', base_digest, method, servability, max_rank, num_bytes, num_files, metadata, "
        "provenance, search_text, created_at, created_by, NULL, NULL FROM versions WHERE version = 1"
    ),
    "replaced file": (
        f"INSERT OR REPLACE INTO version_files VALUES (1, 'adapter_config.json', '{DIGEST}', 1)"
    ),
}


def run(registry: Registry, statement: str) -> None:
    with begin(registry.database) as connection:
        connection.execute(text(statement))


def test_the_database_refuses_to_change_what_is_published(
    registry: Registry, tmp_path: Path
) -> None:
    for content in "abc":
        put(registry, tmp_path, content, metadata={"x": 1})
    registry.set_alias("ann/sums", "latest", 2, actor="t")
    registry.delete("ann/sums@3", "t")
    before = registry.versions("ann/sums", None)
    is_sqlite = registry.database.dialect.name == "sqlite"
    for name, statement in {**REFUSED, **(REFUSED_BY_SQLITE if is_sqlite else {})}.items():
        try:
            run(registry, statement)
        except DBAPIError:
            continue
        pytest.fail(f"{name} was allowed")
    assert registry.versions("ann/sums", None) == before
    assert registry.fsck().is_clean


def test_an_alias_moves_only_from_where_it_was_expected(registry: Registry, tmp_path: Path) -> None:
    for content in "ab":
        put(registry, tmp_path, content)
    registry.set_alias("ann/sums", "prod", 1, expect=0, actor="t")
    for expect in (0, 2):
        with pytest.raises(Conflict, match="leads to version 1") as refused:
            registry.set_alias("ann/sums", "prod", 2, expect=expect, actor="t")
        assert refused.value.code == "conflict"
    assert registry.resolve("ann/sums@prod", caller=None).version == 1
    registry.set_alias("ann/sums", "prod", 2, expect=1, actor="t")
    with pytest.raises(Conflict, match="does not exist"):
        registry.set_alias("ann/sums", "other", 2, expect=1, actor="t")
    for number in (-1, 0, 3, 2**40, 2**70):  # more than a column holds is still only not there
        with pytest.raises(NotFound):
            registry.set_alias("ann/sums", "prod", number, actor="t")
    registry.drop_alias("ann/sums", "prod", expect=2, actor="t")
    with pytest.raises(NotFound):
        registry.drop_alias("ann/sums", "prod", actor="t")


def test_of_many_swaps_at_once_exactly_one_wins(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    registry = open_registry()
    for number in range(5):
        put(registry, tmp_path, f"{number}", alias=None)
    registry.set_alias("ann/sums", "prod", 5, actor="t")
    won: list[int] = []
    start = threading.Barrier(4)

    def swap(number: int) -> None:
        with open_registry() as mine:
            start.wait()
            try:
                mine.set_alias("ann/sums", "prod", number, expect=5, actor=f"t{number}")
            except Conflict:
                return
            won.append(number)

    threads = [threading.Thread(target=swap, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert registry.resolve("ann/sums@prod", caller=None).version == won[0]


def test_a_version_with_aliases_is_deleted_only_by_force(
    registry: Registry, tmp_path: Path
) -> None:
    put(registry, tmp_path, "a")
    put(registry, tmp_path, "b")
    registry.set_alias("ann/sums", "prod", 2, actor="t")
    with pytest.raises(Conflict, match="latest, prod still lead to ann/sums@2"):
        registry.delete("ann/sums@2", "t")
    with pytest.raises(Conflict):
        registry.delete("ann/sums@prod", "t")
    assert registry.delete("ann/sums@2", "t", force=True) == (2,)
    for ref in ("ann/sums@2", "ann/sums@latest", "ann/sums@prod"):
        with pytest.raises(NotFound):
            registry.resolve(ref, caller=None)
    assert [v.version for v in registry.versions("ann/sums", None)] == [1]


def test_a_deleted_number_is_never_given_out_again(registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "a")
    registry.delete("ann/sums@1", "t", force=True)
    assert put(registry, tmp_path, "a").version == 2  # also for the same content
    put(registry, tmp_path, "b")
    assert registry.delete("ann/sums", "t") == (2, 3)
    with pytest.raises(NotFound):
        registry.delete("ann/sums", "t")
    again = put(registry, tmp_path, "c")
    assert again.ref == "ann/sums@4"
    with pytest.raises(NotFound):
        registry.resolve("ann/sums@1", caller=None)


def test_an_alias_that_is_no_alias_is_refused(registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "a")
    for alias in ("1", "", "a/b", "A", "sha256:x"):
        with pytest.raises(ValueError, match="alias"):
            registry.set_alias("ann/sums", alias, 1, actor="t")
    with pytest.raises(RegistryError, match="actor"):
        registry.set_alias("ann/sums", "x", 1, actor="")
