"""The local folder of a version: its bytes and nothing else, made once, however many ask at the same time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux.registry import Corrupt, FileEntry, Registry
from registry.uploads import Upload, put, sha, stage


def test_a_folder_has_exactly_the_files_of_the_version(registry: Registry, tmp_path: Path) -> None:
    paths = (
        "mixture_config.json",
        "experts/0/adapter_config.json",
        "experts/1/adapter_config.json",
    )
    files = tuple(stage(tmp_path / "staged", path, path.encode()) for path in paths)
    mixture = Upload(files, "e" * 64, method="mixlora")
    version = registry.publish(mixture, tenant="ann", name="mix", actor="t")
    folder = registry.folder(version)
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert {path: file.read_text() for path, file in found.items()} == {p: p for p in paths}
    assert all(file.stat().st_mode & 0o222 == 0 for file in found.values())
    assert registry.folder(version) == folder


@pytest.mark.parametrize("damage", ["changed", "missing", "more"])
def test_a_damaged_copy_is_made_again(registry: Registry, tmp_path: Path, damage: str) -> None:
    version = put(registry, tmp_path, "a")
    weights = registry.folder(version) / "adapter_model.safetensors"
    weights.chmod(0o644)
    if damage == "changed":
        weights.write_text("b")
    elif damage == "missing":
        weights.unlink()
    else:
        (weights.parent / "more.json").write_text("{}")
    assert registry.folder(version) == weights.parent
    assert weights.read_text() == "a" and len(list(weights.parent.iterdir())) == 2


def test_a_copy_is_never_made_of_damaged_bytes(registry: Registry, tmp_path: Path) -> None:
    version = put(registry, tmp_path, "a")
    blob = tmp_path / "registry" / "blobs" / sha(b"a")[:2] / sha(b"a")
    blob.chmod(0o644)
    blob.write_text("b")
    with pytest.raises(Corrupt, match="fsck"):
        registry.folder(version)
    assert list((tmp_path / "registry" / "cache").iterdir()) == []


def test_a_path_out_of_the_folder_is_refused_even_from_the_database(
    registry: Registry, tmp_path: Path
) -> None:
    version = put(registry, tmp_path, "a")
    for path in ("../x", "/tmp/x", "a/../../x", "a\\x"):
        files = (FileEntry(path, version.files[0].sha256, 2),)
        with pytest.raises(Corrupt, match="leaves its folder"):
            registry.folder(dataclasses.replace(version, files=files))


def test_many_may_ask_at_once(open_registry: Callable[..., Registry], tmp_path: Path) -> None:
    version = put(open_registry(), tmp_path, "a" * 300_000)
    found: list[Path] = []
    start = threading.Barrier(6)

    def ask() -> None:
        with open_registry() as mine:
            start.wait()
            for _ in range(3):
                found.append(mine.folder(version))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18 and len(set(found)) == 1
    assert len(list((tmp_path / "registry" / "cache").iterdir())) == 1
