"""Local folders of versions, as PEFT and the engine read them: made from blobs, checked at every use.

Why a folder per content: two processes may build the same one, the second finds the first's. A folder appears by one
rename and is read-only; one that does not match the version any more is put aside and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from loramux.registry.blobs import storing
from loramux.registry.errors import Corrupt
from loramux.registry.parts import Parts
from loramux.registry.types import Version

TRIES = 5
_PART = ".part-"


def folder_of(parts: Parts, version: Version) -> Path:
    """A local folder whose every byte was compared with the version's file digests just now."""
    target = parts.cache / key_of(version)
    if is_whole(target, version):
        with contextlib.suppress(OSError):
            os.utime(target)  # used: not to be cleared soon
        return target
    for attempt in range(TRIES):
        part = parts.cache / f"{_PART}{secrets.token_hex(8)}"
        with storing():
            try:
                parts.cache.mkdir(parents=True, exist_ok=True)
                _build(parts, version, part)
                _place(part, target, version)
                return target
            except FileNotFoundError:  # a collector without patience took it away
                if attempt + 1 == TRIES:
                    raise
            finally:
                _remove(part)
    raise AssertionError("left the loop without a folder or an error")


def key_of(version: Version) -> str:
    """By paths and bytes: the version's digest may be equal for two spellings of one config."""
    listed = "\n".join(f"{file.sha256} {file.path}" for file in version.files)
    return hashlib.sha256(listed.encode()).hexdigest()


def is_whole(folder: Path, version: Version) -> bool:
    """Exactly the version's files, with exactly its bytes."""
    try:
        if set(_listed(folder)) != {file.path for file in version.files}:
            return False
        for file in version.files:
            with (folder / file.path).open("rb") as read:
                if hashlib.file_digest(read, "sha256").hexdigest() != file.sha256:
                    return False
    except OSError:
        return False
    return True


def _listed(folder: Path, prefix: str = "") -> Iterator[str]:
    """Everything below that is no folder, with "/" between. A link to a folder is no folder."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from _listed(folder / entry.name, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}"


def clear_unused(parts: Parts, used: set[str], older_than_s: float) -> int:
    """Remove folders of versions that are gone and unfinished ones, if nobody used them lately."""
    if not parts.cache.is_dir():
        return 0
    count = 0
    for folder in sorted(parts.cache.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            idle_s = time.time() - folder.stat().st_mtime
            if folder.name not in used and idle_s >= older_than_s:
                _remove(folder)
                count += 1
    return count


def _build(parts: Parts, version: Version, part: Path) -> None:
    part.mkdir()
    for file in version.files:
        pure = PurePosixPath(file.path)
        # Refused at upload already; the database is not trusted with a path either.
        if pure.is_absolute() or ".." in pure.parts or "\\" in file.path:
            raise Corrupt(f"{version.ref} has a file name that leaves its folder; it is not loaded")
        target = part / pure
        target.parent.mkdir(parents=True, exist_ok=True)
        parts.blobs.fetch(file.sha256, target)
        target.chmod(0o444)


def _place(part: Path, target: Path, version: Version) -> None:
    for _ in range(TRIES):
        with contextlib.suppress(
            OSError
        ):  # not empty: somebody was quicker, or it is a damaged one
            os.rename(part, target)
            return
        if is_whole(target, version):
            return
        aside = target.with_name(f"{_PART}{secrets.token_hex(8)}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, aside)  # whoever has its files open keeps them
        _remove(aside)
    raise Corrupt(f"the local copy of {version.ref} keeps changing; check the disk of the cache")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
