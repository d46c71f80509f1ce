"""fsck finds what is wrong, collect removes what nothing leads to, and neither touches what a publish counts on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from loramux.registry import Registry, StorageError
from loramux.registry.blobs import LocalBlobs
from loramux.registry.db import begin
from registry.uploads import put, sha

HOUR = 3600.0


def blob(tmp_path: Path, content: str) -> Path:
    return LocalBlobs(tmp_path / "registry" / "blobs").path(sha(content.encode()))


def test_a_sound_registry_is_clean(registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "a")
    put(registry, tmp_path, "bb")
    report = registry.fsck(grace_s=0)
    assert report.is_clean and not report.has_leftovers
    assert (report.num_versions, report.num_blobs, report.num_bytes) == (2, 3, 5)


def test_fsck_names_missing_damaged_and_untracked_bytes(registry: Registry, tmp_path: Path) -> None:
    for content in ("a", "b", "c"):
        put(registry, tmp_path, content)
    blob(tmp_path, "a").unlink()
    blob(tmp_path, "b").chmod(0o644)
    blob(tmp_path, "b").write_text("B")
    stray = blob(tmp_path, "stray")
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("stray")
    report = registry.fsck()
    assert not report.is_clean
    assert [line.split(":")[0] for line in report.missing] == ["ann/sums@1"]
    assert [line.split(":")[0] for line in report.damaged] == ["ann/sums@2"]
    assert report.untracked == (sha(b"stray"),)
    assert not registry.fsck(deep=False).damaged  # of the same length
    put(registry, tmp_path, "a")
    put(registry, tmp_path, "b")
    assert registry.fsck().is_clean


def test_fsck_finds_what_the_database_should_have_refused(
    registry: Registry, tmp_path: Path
) -> None:
    put(registry, tmp_path, "a")
    is_sqlite = registry.database.dialect.name == "sqlite"
    triggers = ("versions_aliased", "versions_fixed", "version_files_kept")
    tables = ("versions", "versions", "version_files")
    with begin(registry.database) as connection:
        for trigger, table in zip(triggers, tables, strict=True):
            disable = f"ALTER TABLE {table} DISABLE TRIGGER {trigger}"
            connection.execute(text(f"DROP TRIGGER {trigger}" if is_sqlite else disable))
        connection.execute(text("DELETE FROM version_files WHERE path LIKE '%json'"))
    report = registry.fsck()
    assert report.dangling == ("ann/sums@1 lacks entries of its files",)
    with begin(registry.database) as connection:
        connection.execute(text("UPDATE versions SET deleted_at = 1"))
    assert registry.fsck().dangling == ("ann/sums@latest leads nowhere",)
    if not is_sqlite:  # this schema is used again
        with begin(registry.database) as connection:
            for trigger, table in zip(triggers, tables, strict=True):
                connection.execute(text(f"ALTER TABLE {table} ENABLE TRIGGER {trigger}"))


def test_collect_removes_only_what_is_unused_and_old(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    now = [time.time()]
    registry = open_registry(clock=lambda: now[0])
    put(registry, tmp_path, "a")
    put(registry, tmp_path, "b")
    now[0] += 10 * HOUR
    registry.delete("ann/sums@1", "t", force=True)
    report = registry.collect(HOUR)  # the grace time of its blobs starts with the deletion
    assert (report.num_blobs, report.num_young) == (0, 1) and blob(tmp_path, "a").exists()
    now[0] += 2 * HOUR
    report = registry.collect(HOUR)
    assert (report.num_blobs, report.num_bytes, report.num_young) == (1, 1, 0)
    assert not blob(tmp_path, "a").exists() and blob(tmp_path, "b").exists()
    assert blob(tmp_path, "{}").exists()  # still used by the other version
    assert registry.fsck().is_clean


def test_bytes_of_unknown_origin_get_the_grace_time_too(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    now = [time.time()]
    registry = open_registry(clock=lambda: now[0])
    stray = blob(tmp_path, "stray")
    stray.parent.mkdir(parents=True)
    stray.write_text("stray")
    assert registry.collect(HOUR).num_young == 1 and stray.exists()
    now[0] += 2 * HOUR
    assert registry.collect(HOUR).num_blobs == 1 and not stray.exists()


def test_a_publish_that_finds_its_blob_is_safe_from_a_collector(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    """The blob is old and unused, the publish sees that it is there, then the collector runs."""
    now = [time.time()]
    collector = open_registry(clock=lambda: now[0])
    put(collector, tmp_path, "a")
    collector.delete("ann/sums", "t")
    now[0] += 100 * HOUR
    collected: list[int] = []

    def between(step: str) -> None:
        if step.startswith("blob") and not collected:
            collected.append(collector.collect(HOUR).num_blobs)

    publisher = open_registry(clock=lambda: now[0], step=between)
    version = put(publisher, tmp_path, "a")
    assert collected == [0]
    assert publisher.fsck().is_clean and publisher.folder(version).is_dir()


def test_a_lease_holds_although_another_host_with_a_slow_clock_used_the_blob(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    slow, right = open_registry(clock=lambda: 0.0), open_registry(clock=lambda: 100 * HOUR)
    collected: list[int] = []

    def between(step: str) -> None:
        if step == "blob adapter_model.safetensors" and not collected:
            put(slow, tmp_path, "a", name="other")
            slow.delete("ann/other", "t")
            collected.append(right.collect(HOUR).num_blobs)

    version = put(open_registry(clock=lambda: 100 * HOUR, step=between), tmp_path, "a")
    assert collected == [0]
    assert right.fsck().is_clean and right.folder(version).is_dir()


def test_a_publish_whose_blobs_were_collected_all_the_same_starts_again(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    """No grace time at all: what the first try stored is gone before it commits."""
    collector = open_registry()
    removed: list[int] = []

    def between(step: str) -> None:
        if step == "blob adapter_model.safetensors" and len(removed) < 2:
            removed.append(collector.collect(0).num_blobs)

    version = put(open_registry(step=between), tmp_path, "a")
    assert removed == [2, 2]
    assert collector.fsck(grace_s=0).is_clean and not collector.fsck(grace_s=0).has_leftovers
    assert collector.folder(version).is_dir()


def test_publishing_and_collecting_at_once_never_lose_a_blob(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    done = threading.Event()
    collector = open_registry()

    def collect() -> None:
        while not done.is_set():
            collector.collect(0.05)

    thread = threading.Thread(target=collect)
    thread.start()
    published = 0
    try:
        registry = open_registry()
        for number in range(12):
            with contextlib.suppress(StorageError):  # collected five times while it was published
                put(registry, tmp_path, f"{number % 3}")
                published += 1
                if number % 2:
                    registry.delete("ann/sums", "t")
    finally:
        done.set()
        thread.join()
    assert published and registry.fsck().is_clean


def test_repair_tidies_leftovers_and_says_what_it_cannot_mend(
    registry: Registry, tmp_path: Path
) -> None:
    put(registry, tmp_path, "a")
    blob(tmp_path, "a").unlink()
    part = tmp_path / "registry" / "blobs" / "tmp" / "part"
    part.write_text("x")
    with begin(registry.database) as connection:
        connection.execute(text("INSERT INTO blob_leases VALUES ('t', 'x', 1.0)"))
    assert len(registry.fsck(grace_s=0).unfinished) == 2
    assert registry.fsck().unfinished == ("lease t",)  # the file is young
    report = registry.fsck(repair=True, grace_s=0)
    assert report.repaired and not report.is_clean and not part.exists()
    assert not registry.fsck(grace_s=0).has_leftovers


@pytest.mark.parametrize("remote", [False, True])
def test_local_copies_of_deleted_versions_go_with_the_collection(
    tmp_path: Path, remote: bool
) -> None:
    where = "memory://copies/blobs" if remote else None
    with Registry.open(tmp_path / "registry", blobs=where) as registry:
        kept, gone = put(registry, tmp_path, "a"), put(registry, tmp_path, "b", name="other")
        folders = registry.folder(kept), registry.folder(gone)
        registry.delete("ann/other", "t")
        assert registry.collect(HOUR).num_cached == 0
        assert registry.collect(0).num_cached == 1
        assert [folder.exists() for folder in folders] == [True, False]
