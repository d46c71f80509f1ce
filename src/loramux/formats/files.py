"""Files and folders: read without following links, write so that a kill leaves the old or the new.

Why: an adapter folder comes from anywhere. A link in it could name any file of this machine, a pipe could block for
ever, and a half-written file must never look like an adapter.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from loramux.errors import LoramuxError
from loramux.formats.errors import FormatError

_READ = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_regular(path: Path) -> BinaryIO:
    """Open for reading; links (except a hub cache's own), devices and pipes are refused."""
    target = _without_link(path)
    try:
        handle = os.open(target, _READ)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist", code="missing_file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}", code="unreadable") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path} is not a regular file", code="unsafe_path")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    """The whole of a regular file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise FormatError(
                f"{path} has {size:,} bytes, at most {limit:,} are read", code="too_large"
            )
        return file.read()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` in one step; a link at `path` is replaced, not followed."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_place(path: Path, option: str = "--out") -> None:
    """Refuse a path at which nothing can be made; leaves nothing behind. For use before hours of work."""
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".loramux-", dir=parent):
            return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LoramuxError(
            f"{option} {path} cannot be made: {why} in {parent}; choose another place"
        ) from None


def is_real_folder(path: Path) -> bool:
    """A folder that is not a link."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Build a folder beside `target`, then put it in its place; on any error `target` is as before.

    Between the two renames the old folder exists as `.NAME.previous`; `recover_folder` brings it back after a kill.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    previous = _previous(target)
    try:
        part.mkdir(parents=True)
        fill(part)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(target, previous)
        try:
            os.rename(part, target)
        except OSError:
            recover_folder(target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo a replacement that was killed half-way."""
    target = Path(os.path.abspath(target))
    if not os.path.lexists(target) and is_real_folder(previous := _previous(target)):
        os.rename(previous, target)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _without_link(path: Path) -> Path:
    """`path`, or for a hub cache (snapshots/REVISION/FILE -> ../../blobs/HASH) the blob it links to."""
    if not path.is_symlink():
        return path
    here = path.absolute()
    blob = Path(os.path.normpath(here.parent / os.readlink(path)))
    for snapshots in here.parents:
        if snapshots.name == "snapshots" and blob.parent == snapshots.parent / "blobs":
            return blob
    raise FormatError(
        f"{path} is a link; links are not followed, copy the file itself here", code="unsafe_path"
    )
