"""A registry and the place of its blobs know each other: another place is one clear error, and nothing is changed."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from loramux.cli.main import main
from loramux.registry import Registry, StorageError
from loramux.registry.blobs import LocalBlobs
from registry.uploads import put, sha


@pytest.fixture(params=["folder", "memory://"])
def place(request: Any, tmp_path: Path) -> Any:
    """Makes places of one kind."""
    if request.param == "folder":
        return lambda name: str(tmp_path / name)
    own = secrets.token_hex(4)
    return lambda name: f"memory://{own}-{name}/blobs"


def opened(tmp_path: Path, name: str, blobs: str | None) -> Registry:
    return Registry.open(tmp_path / name, blobs=blobs)


@pytest.mark.parametrize("is_marked", [False, True], ids=["empty", "another"])
def test_blobs_elsewhere_are_one_error_and_nothing_is_changed(
    place: Any, tmp_path: Path, is_marked: bool
) -> None:
    with opened(tmp_path, "one", place("own")) as registry:
        version = put(registry, tmp_path, "a")
    if is_marked:
        with opened(tmp_path, "two", place("wrong")) as other:
            put(other, tmp_path, "b")
    with opened(tmp_path, "one", place("wrong")) as registry:
        assert registry.resolve(version.ref, caller=None) == version  # no blob is needed
        for use in (
            lambda: registry.folder(version),
            lambda: put(registry, tmp_path, "c"),
            registry.fsck,
            lambda: registry.fsck(repair=True),
            lambda: registry.collect(grace_s=0),
        ):
            with pytest.raises(StorageError, match="--blobs") as caught:
                use()
            assert caught.value.code == "wrong_blobs"
    with opened(tmp_path, "one", place("own")) as registry:
        assert registry.fsck().is_clean
    if is_marked:
        with opened(tmp_path, "two", place("wrong")) as other:
            assert other.fsck().is_clean


def test_a_place_of_a_registry_from_before_is_marked_at_the_first_write(tmp_path: Path) -> None:
    with opened(tmp_path, "one", None) as registry:
        version = put(registry, tmp_path, "a")
    mark = tmp_path / "one" / "blobs" / "registry"
    mark.unlink()
    with opened(tmp_path, "one", None) as registry:
        assert registry.folder(version).is_dir() and not mark.exists()
        put(registry, tmp_path, "b")
        assert mark.is_file()


def test_a_place_that_lost_some_of_the_blobs_is_still_the_registry_s(tmp_path: Path) -> None:
    with opened(tmp_path, "one", None) as registry:
        put(registry, tmp_path, "a")
    blobs = tmp_path / "one" / "blobs"
    (blobs / "registry").unlink()  # as a copy by hand would leave it
    lost = sha(b"a")
    [path] = [each for each in blobs.rglob("*") if lost in each.name]
    path.unlink()
    with opened(tmp_path, "one", None) as registry:
        assert not registry.fsck().is_clean  # it says what is missing, not that the place is wrong
        put(registry, tmp_path, "b")
    assert (blobs / "registry").is_file()


def test_of_two_registries_that_begin_at_one_place_at_once_one_is_refused(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, "one", place("own")) as one, opened(tmp_path, "two", place("own")) as two:
        blobs = one._parts.blobs
        mark = blobs.set_mark

        def late(owner: str) -> None:
            put(two, tmp_path, "b")
            if isinstance(blobs, LocalBlobs):
                mark(owner)  # elsewhere the last one stays

        monkeypatch.setattr(blobs, "set_mark", late)
        with pytest.raises(StorageError, match="another registry"):
            put(one, tmp_path, "a")
        assert two.fsck().is_clean


def test_a_registry_that_was_moved_with_its_blobs_is_the_same(tmp_path: Path) -> None:
    with opened(tmp_path, "one", None) as registry:
        version = put(registry, tmp_path, "a")
    (tmp_path / "one").rename(tmp_path / "moved")
    with opened(tmp_path, "moved", None) as registry:
        assert registry.folder(version).is_dir() and registry.fsck().is_clean


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: Any) -> None:
    with opened(tmp_path, "one", str(tmp_path / "far")) as registry:
        put(registry, tmp_path, "a")
    where = ["--root", str(tmp_path / "one")]
    assert main(["registry", "fsck", *where]) == 2
    assert "are not at this place" in capsys.readouterr().err
    assert main(["registry", "list", *where, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
