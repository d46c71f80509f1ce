"""A full disk, a read-only disk, a lost database: one clear error, no path in it, nothing half done."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

import loramux.registry.db as db
from loramux.registry import Registry, StorageError
from loramux.registry.blobs import RemoteBlobs
from loramux.registry.db import begin
from loramux.registry.tables import lock_writers
from registry.test_publish import counted
from registry.uploads import put

CODES = {
    errno.ENOSPC: "storage_full",
    errno.EDQUOT: "storage_full",
    errno.EROFS: "storage_read_only",
    errno.EACCES: "storage_read_only",
    errno.EIO: "storage",
}
FAULTS = (
    *(("fsync", errno.ENOSPC), ("replace", errno.ENOSPC), ("fchmod", errno.EDQUOT)),
    *(("fsync", errno.EIO), ("replace", errno.EROFS), ("fchmod", errno.EACCES)),
)


@pytest.mark.parametrize(("call", "number"), FAULTS)
def test_a_failing_disk_is_one_clear_error_with_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        put(registry, tmp_path, "a")
        before = counted(registry)

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path))

        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with pytest.raises(StorageError) as refused:
                put(registry, tmp_path, "b")
        assert refused.value.code == CODES[number]
        assert str(tmp_path) not in str(refused.value) and "repeat" in str(refused.value)
        assert counted(registry) == before
        assert registry.fsck(grace_s=0).is_clean and not registry.fsck(grace_s=0).unfinished
        assert put(registry, tmp_path, "b").version == 2


def test_a_full_database_changes_nothing(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        put(registry, tmp_path, "a")
        before = counted(registry)
        with registry.database.connect() as connection:  # the pool hands the same one out again
            pages = connection.execute(text("PRAGMA page_count")).scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        refused: list[str] = []
        for number in range(20):
            try:
                put(registry, tmp_path, f"{number}", name=f"n{number}", metadata={"x": "y" * 9000})
            except StorageError as error:
                refused.append(error.code)
                break
            before = counted(registry)
        assert refused == ["storage_full"]
        assert counted(registry) == before
        with registry.database.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert registry.fsck(grace_s=0).is_clean
        put(registry, tmp_path, "b")


def test_a_read_only_database_changes_nothing(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        put(registry, tmp_path, "a")
        before = counted(registry)
        with registry.database.connect() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")
        with pytest.raises(StorageError, match="read-only") as refused:
            put(registry, tmp_path, "b")
        assert refused.value.code == "storage_read_only"
        assert counted(registry) == before


LIMITED = """
import resource, signal, sys
from pathlib import Path
from loramux.registry import Registry, StorageError
from registry.uploads import put
folder = Path(sys.argv[1])
with Registry.open(folder / "registry") as registry:
    put(registry, folder, "a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        put(registry, folder, "b" * 2_000_000)
    except (StorageError, OSError) as error:
        print(type(error).__name__, getattr(error, "code", ""))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report = registry.fsck(grace_s=0)
    print(report.is_clean, report.unfinished, report.untracked, registry.resolve("ann/sums", caller=None).ref)
"""


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    """A real short write: staged beforehand, so that the limit strikes inside the blob store."""
    code = LIMITED.replace(
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000",
        "    import registry.uploads as u; big = u.upload(folder / 'staged', 'b' * 2_000_000)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000",
    ).replace(
        'put(registry, folder, "b" * 2_000_000)',
        'registry.publish(big, tenant="ann", name="sums", actor="t")',
    )
    here = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["StorageError storage_full", "True () () ann/sums@1"], (
        done.stdout + done.stderr[-2000:]
    )


def test_a_database_that_stays_locked_says_so(
    open_registry: Callable[..., Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LOCK_WAIT_S", 0.05)
    registry = open_registry()
    with begin(registry.database) as connection:
        lock_writers(connection)
        errors: list[StorageError] = []

        def publish() -> None:
            try:
                put(registry, tmp_path, "a")
            except StorageError as error:
                errors.append(error)

        thread = threading.Thread(target=publish)
        thread.start()
        thread.join()
        assert [error.code for error in errors] == ["database_busy"]


def test_a_database_without_a_free_connection_says_so(
    open_registry: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LOCK_WAIT_S", 0.05)
    registry = open_registry()
    with contextlib.ExitStack() as held:
        for _ in range(15):
            held.enter_context(registry.database.connect())
        with pytest.raises(StorageError, match="every connection") as refused:
            registry.generation()
    assert refused.value.code == "database_busy"
    assert registry.generation() > 0


@pytest.mark.parametrize("call", ["put_file", "open", "mv", "makedirs"])
def test_a_blob_store_that_fails_in_its_own_way_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    class SlowDown(Exception):
        """What a client of an object store raises: no OSError."""

    def fail(*_: object, **__: object) -> None:
        raise SlowDown("see https://secret.example")

    with Registry.open(tmp_path / "registry", blobs=f"memory://fails-{call}/blobs") as registry:
        put(registry, tmp_path, "a")
        before = counted(registry)
        store = registry._parts.blobs
        assert isinstance(store, RemoteBlobs)
        with monkeypatch.context() as broken:
            broken.setattr(store.fs, call, fail)
            with pytest.raises(StorageError, match="SlowDown") as refused:
                put(registry, tmp_path, "b")
        assert "secret" not in str(refused.value)
        assert counted(registry) == before
        assert put(registry, tmp_path, "b").version == 2


def test_a_database_that_is_gone_says_so(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match="check that it runs") as refused:
        Registry.open(tmp_path, url=f"postgresql://nobody@/nothing?host={tmp_path}")
    assert refused.value.code == "database_unavailable"
    assert str(tmp_path) not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "registry.sqlite3").write_text("not a database at all" * 100)
    with pytest.raises(StorageError):
        Registry.open(tmp_path / "registry")


def test_readers_go_on_while_somebody_writes(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    registry = open_registry()
    version = put(registry, tmp_path, "a")
    other = open_registry()
    with begin(registry.database) as connection:
        connection.execute(text("UPDATE generation SET value = value + 1"))
        assert other.resolve("ann/sums", caller="ann") == version
        seen = other.generation()
    assert other.generation() == seen + 1
