"""Blobs on a folder and on an fsspec file system keep the same promises."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux.registry import Corrupt, Registry, RegistryError
from loramux.registry.blobs import Blobs, LocalBlobs, RemoteBlobs, open_blobs
from registry.uploads import put, sha

DATA = b"weights" * 1000
SHA = sha(DATA)


@pytest.fixture(params=["folder", "file://", "memory://"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory://":
        import fsspec

        url = f"memory://{secrets.token_hex(4)}/blobs"
        yield url
        with contextlib.suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)
    else:
        yield str(tmp_path / "blobs") if request.param == "folder" else f"file://{tmp_path}/blobs"


@pytest.fixture
def blobs(where: str) -> Blobs:
    return open_blobs(where)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(DATA)
    return tmp_path / "source"


def overwrite(blobs: Blobs, data: bytes) -> None:
    if isinstance(blobs, LocalBlobs):
        blobs.path(SHA).chmod(0o644)
        blobs.path(SHA).write_bytes(data)
    else:
        assert isinstance(blobs, RemoteBlobs)
        blobs.fs.pipe_file(blobs.path(SHA), data)


def test_a_blob_is_stored_once_found_and_fetched(
    blobs: Blobs, source: Path, tmp_path: Path
) -> None:
    assert list(blobs.walk()) == [] and blobs.size(SHA) is None and not blobs.is_whole(SHA)
    assert blobs.put(source, SHA) and not blobs.put(source, SHA)
    assert list(blobs.walk()) == [SHA] and blobs.size(SHA) == len(DATA) and blobs.is_whole(SHA)
    assert blobs.fetch(SHA, tmp_path / "copy") == len(DATA)
    assert (tmp_path / "copy").read_bytes() == DATA
    assert list(blobs.temporary(0)) == []
    blobs.delete(SHA)
    blobs.delete(SHA)
    assert list(blobs.walk()) == []


def test_bytes_that_do_not_match_their_name_are_not_stored(blobs: Blobs, source: Path) -> None:
    with pytest.raises(Corrupt, match="not what was checked"):
        blobs.put(source, "0" * 64)
    assert list(blobs.walk()) == [] and list(blobs.temporary(0)) == []


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA[:-1] + b"X"])
def test_a_damaged_blob_is_noticed_and_mended_by_the_next_publish(
    blobs: Blobs, source: Path, tmp_path: Path, damage: bytes
) -> None:
    blobs.put(source, SHA)
    overwrite(blobs, damage)
    assert not blobs.is_whole(SHA)
    with pytest.raises(Corrupt):
        blobs.fetch(SHA, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert blobs.put(source, SHA) and blobs.is_whole(SHA)


def test_a_missing_blob_says_what_to_do(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="fsck"):
        blobs.fetch(SHA, tmp_path / "copy")


def test_a_name_that_is_no_hash_never_becomes_a_path(blobs: Blobs, source: Path) -> None:
    for name in ("../../x", "A" * 64, "0" * 63, "", "/etc/passwd"):
        for ask in (blobs.size, blobs.delete, blobs.is_whole, lambda n: blobs.put(source, n)):
            with pytest.raises(RegistryError, match="SHA-256"):
                ask(name)


def test_a_write_that_reads_back_differently_is_not_given_its_name(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    monkeypatch.setattr(os, "fsync", lambda handle: os.truncate(handle, 10))  # a lying disk
    with pytest.raises(Corrupt):
        blobs.put(source, SHA)
    assert list(blobs.walk()) == [] and list(blobs.temporary(0)) == []


def test_unfinished_writes_are_known_by_their_age(tmp_path: Path, source: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.put(source, SHA)
    (blobs.tmp / "old").write_bytes(b"x")
    os.utime(blobs.tmp / "old", (time.time() - 100,) * 2)
    (blobs.tmp / "young").write_bytes(b"x")
    assert list(blobs.temporary(50)) == ["old"]
    blobs.discard("old")
    assert list(blobs.temporary(0)) == ["young"]


def test_a_registry_keeps_its_blobs_behind_a_url(where: str, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "one", blobs=where) as registry:
        version = put(registry, tmp_path, "a")
        put(registry, tmp_path, "b")
        assert (registry.folder(version) / "adapter_model.safetensors").read_text() == "a"
        registry.delete("ann/sums@1", "t", force=True)
        assert registry.fsck().is_clean
        assert registry.collect(0).num_blobs == 1
        after = registry.fsck(grace_s=0)
        assert after.is_clean and not after.has_leftovers and after.num_blobs == 2


def test_an_unknown_kind_of_url_is_one_clear_error(tmp_path: Path) -> None:
    for more in ({"blobs": "nope://x"}, {"url": "mysql://x"}, {"url": "x"}, {"url": "sqlite://"}):
        with pytest.raises(RegistryError) as refused:
            Registry.open(tmp_path / "registry", **more)
        assert refused.value.code == "bad_url"
