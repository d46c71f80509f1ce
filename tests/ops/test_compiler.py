"""The kernel is compiled once per machine and survives a damaged cache."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from loramux.ops import compiler

TEXT = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    try:
        compiler.find_compiler()
    except compiler.BuildError as error:
        pytest.skip(str(error))
    path = tmp_path / "src" / "answer.c"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_a_second_build_reuses_the_file(source: Path, tmp_path: Path) -> None:
    first = compiler.build(source, (), tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert answer(first) == 42
    assert compiler.build(source, (), tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    assert sorted(p.suffix for p in first.parent.iterdir()) == [".sha256", ".so"]


def test_another_text_header_or_flag_is_another_file(source: Path, tmp_path: Path) -> None:
    built = {compiler.build(source, (), tmp_path / "cache")}
    built.add(compiler.build(source, ("-DX=1",), tmp_path / "cache"))
    source.with_name("part.h").write_text("/* new */\n")
    built.add(compiler.build(source, (), tmp_path / "cache"))
    source.write_text(TEXT.replace("42", "43"))
    built.add(compiler.build(source, (), tmp_path / "cache"))
    assert len(built) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "unsealed"])
def test_a_damaged_file_is_built_again(source: Path, tmp_path: Path, damage: str) -> None:
    path = compiler.build(source, (), tmp_path / "cache")
    intact = path.read_bytes()
    if damage == "unsealed":
        path.with_suffix(".sha256").unlink()
    else:
        middle = len(intact) // 2
        flipped = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
        path.write_bytes({"cut": intact[:1000], "changed": flipped, "empty": b""}[damage])
    assert answer(compiler.build(source, (), tmp_path / "cache")) == 42


def test_the_cache_lies_where_the_user_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "loramux" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiler.cache_folder() == tmp_path / "home" / ".cache" / "loramux" / "kernels"


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(
    source: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert answer(compiler.build(source, (), blocked / "cache")) == 42


def test_a_text_that_does_not_compile_shows_the_compilers_words(
    source: Path, tmp_path: Path
) -> None:
    source.write_text("int answer(void) { return missing; }\n")
    with pytest.raises(compiler.BuildError, match="missing"):
        compiler.build(source, (), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_compiler_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(compiler.BuildError, match="install gcc or clang"):
        compiler.find_compiler()
