"""Where an upload comes from: a folder, single files, an archive; each a list of members with untrusted names.

Why no addresses: a server that fetches what a request names can be made to fetch from its own network. There is no
code here that opens a connection; files are uploaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from loramux.formats.errors import FormatError
from loramux.formats.files import open_regular
from loramux.registry.checks.errors import UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.names import shown

CHUNK = 2**18
MAX_DEPTH = 4

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


@dataclass(frozen=True)
class Member:
    """One file of an upload: its name as given, and its bytes in pieces; reading may fail."""

    name: str
    chunks: Callable[[], Iterator[bytes]]


class Source(Protocol):
    """A parcel that can be opened once."""

    def members(
        self, limits: UploadLimits, scratch: Path
    ) -> contextlib.AbstractContextManager[list[Member]]:
        """Every member; `scratch` is a folder for files without a name."""


def from_folder(path: str | os.PathLike[str]) -> Source:
    """A folder on this machine, for a command line; a server must not let requests choose it."""
    return _Folder(local_path(path))


def from_members(members: Mapping[str, bytes | str | os.PathLike[str]]) -> Source:
    """Single files by their relative names: bytes, or paths of files that hold them."""
    return _Members(dict(members))


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine; refuses addresses."""
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise UploadError(
            f"{shown(text)} is an address; nothing is fetched from other machines. Download it first, then give the "
            "folder or the archive",
            code="remote",
        )
    return Path(text)


def open_source_file(path: Path, shown_as: str) -> BinaryIO:
    """A regular file of this machine; errors carry its short name only."""
    try:
        return open_regular(path)
    except FormatError as error:
        raise UploadError(str(error).replace(str(path), shown_as), code=error.code) from None


def pieces(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


@dataclass(frozen=True)
class _Folder:
    path: Path

    @contextlib.contextmanager
    def members(self, limits: UploadLimits, scratch: Path) -> Iterator[list[Member]]:
        if not self.path.is_dir():
            raise UploadError(
                f"{shown(str(self.path))} is not a folder; give the folder an adapter was saved to",
                code="missing_file",
            )
        found: list[Member] = []
        for path in _walk(self.path, MAX_DEPTH):
            if len(found) == limits.max_members:
                raise UploadError(
                    f"the folder holds more than {limits.max_members:,} files; give the adapter's own folder",
                    code="too_many_files",
                )
            name = path.relative_to(self.path).as_posix()
            found.append(Member(name, lambda path=path, name=name: _file_pieces(path, name)))  # type: ignore[misc]
        yield found


@dataclass(frozen=True)
class _Members:
    given: dict[str, bytes | str | os.PathLike[str]]

    @contextlib.contextmanager
    def members(self, limits: UploadLimits, scratch: Path) -> Iterator[list[Member]]:
        if len(self.given) > limits.max_members:
            raise UploadError(
                f"{len(self.given):,} files were sent, at most {limits.max_members:,} are allowed",
                code="too_many_files",
            )
        found = []
        for name, content in self.given.items():
            if isinstance(content, bytes):
                found.append(Member(name, lambda data=content: pieces(io.BytesIO(data))))  # type: ignore[misc]
            else:
                path = local_path(content)
                found.append(
                    Member(name, lambda path=path, name=name: _file_pieces(path, shown(name)))  # type: ignore[misc]
                )
        yield found


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Files in order of name; hidden folders (a version control's, a cache's) are not entered."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UploadError(
            f"{shown(folder.name)} cannot be read: {error.strerror}", code="unreadable"
        ) from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name.startswith("."):
                continue
            if not depth:
                raise UploadError(
                    f"{shown(entry.name)} lies deeper than {MAX_DEPTH} folders; give the adapter's own folder",
                    code="extra_file",
                )
            yield from _walk(Path(entry.path), depth - 1)
        else:
            yield Path(entry.path)


def _file_pieces(path: Path, shown_as: str) -> Iterator[bytes]:
    with open_source_file(path, shown_as) as file:
        yield from pieces(file)
