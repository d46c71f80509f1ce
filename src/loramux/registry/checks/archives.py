"""Zip, tar and gzipped tar as lists of members: nothing is extracted, links are refused, every read is bounded."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loramux.registry.checks.errors import UploadError
from loramux.registry.checks.limits import MIB, UploadLimits
from loramux.registry.checks.sources import (
    CHUNK,
    Member,
    Source,
    local_path,
    open_source_file,
    pieces,
)
from loramux.registry.checks.tars import (
    BLOCK,
    broken,
    check_number,
    is_old_tar,
    special,
    tar_members,
)
from loramux.registry.names import shown

MOST_READ = MIB  # of one read by the zip parser: its directory, of which each member takes 46 bytes and its name
SLACK = MIB  # what a stream may grow by before its ratio counts: short files of zeros pack well
_PLAIN_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def from_archive(archive: str | os.PathLike[str] | bytes) -> Source:
    """A zip, a tar or a gzipped tar: its bytes, or a file on this machine that holds them."""
    return _Archive(archive if isinstance(archive, bytes) else local_path(archive))


@dataclass(frozen=True)
class _Archive:
    given: bytes | Path

    @contextlib.contextmanager
    def members(self, limits: UploadLimits, scratch: Path) -> Iterator[list[Member]]:
        with self._open() as file:
            size = file.seek(0, os.SEEK_END)
            if size > limits.max_bytes:
                raise UploadError(
                    f"the archive has {size:,} bytes, at most {limits.max_bytes:,} are allowed",
                    code="too_large",
                )
            file.seek(0)
            start = file.read(BLOCK)
            file.seek(0)
            if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                with _zip(file, size) as parcel:
                    yield _zip_members(parcel, limits)
            elif start[:2] == b"\x1f\x8b":
                with tempfile.TemporaryFile(dir=scratch) as plain:
                    _gunzip(file, plain, size, limits)
                    yield tar_members(plain, limits)
            elif start[257:262] == b"ustar" or is_old_tar(start):
                yield tar_members(file, limits)
            else:
                begins = f"it begins with {start[:8].hex(' ')}" if start else "it is empty"
                raise UploadError(
                    f"this is neither a zip nor a tar ({begins}); send .zip, .tar or .tar.gz",
                    code="archive_kind",
                )

    def _open(self) -> BinaryIO:
        if isinstance(self.given, bytes):
            return io.BytesIO(self.given)
        return open_source_file(self.given, shown(self.given.name))


class _Bounded(io.RawIOBase):
    """A file that refuses to be read whole: parsers trust the sizes that files claim."""

    def __init__(self, file: BinaryIO, size: int):
        super().__init__()
        self._file = file
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(self._size - self._file.tell(), 0)
        if size > MOST_READ:
            raise broken(f"its directory claims {size:,} bytes, at most {MOST_READ:,} are read")
        return self._file.read(size)


@contextlib.contextmanager
def _zip(file: BinaryIO, size: int) -> Iterator[zipfile.ZipFile]:
    try:
        parcel = zipfile.ZipFile(_Bounded(file, size))  # type: ignore[arg-type]
    except UploadError:
        raise
    except (
        Exception
    ) as error:  # the parser meets hostile bytes: whatever it raises, the file is at fault
        raise broken(error) from None
    with parcel:
        yield parcel


def _zip_members(parcel: zipfile.ZipFile, limits: UploadLimits) -> list[Member]:
    entries = parcel.infolist()
    check_number(len(entries), limits)
    found = []
    for info in entries:
        # What the parser makes of the name ends at a NUL; the one in the file is judged.
        name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
        is_folder = name.endswith("/") and not info.file_size
        if kind not in ((0, stat.S_IFDIR) if is_folder else (0, stat.S_IFREG)):
            raise special(name)
        if info.flag_bits & 0x1:
            raise UploadError(f"{shown(name)} needs a password; pack it without", code="encrypted")
        if info.compress_type not in _PLAIN_METHODS:
            raise broken(f"{shown(name)} is packed with method {info.compress_type}; use deflate")
        if info.file_size > info.compress_size * limits.max_ratio + SLACK:
            raise _swollen(name, limits)
        if not is_folder:
            found.append(
                Member(name, lambda info=info: _zip_pieces(parcel, info))  # type: ignore[misc]
            )
    return found


def _zip_pieces(parcel: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with parcel.open(info) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except UploadError:
        raise
    except Exception as error:  # as above; what a consumer raises is not seen here
        raise broken(f"{shown(info.orig_filename)}: {error}") from None


def _gunzip(file: BinaryIO, out: BinaryIO, size: int, limits: UploadLimits) -> None:
    """One gzip stream to a file. Not GzipFile: it reads a header's file name one byte at a time, however long."""
    stream, written = zlib.decompressobj(wbits=31), 0
    for chunk in pieces(file):
        while chunk:
            if stream.eof:
                raise broken("there is something behind the end of the gzip stream")
            try:
                plain = stream.decompress(chunk, CHUNK)
            except zlib.error as error:
                raise broken(error) from None
            written += len(plain)
            if written > limits.max_bytes + SLACK:
                raise UploadError(
                    f"the archive unpacks to more than the {limits.max_bytes:,} bytes that are allowed",
                    code="too_large",
                )
            if written > size * limits.max_ratio + SLACK:
                raise _swollen("the archive", limits)
            out.write(plain)
            chunk = stream.unused_data or stream.unconsumed_tail
    if not stream.eof:
        raise broken("it ends in the middle of the gzip stream")


def _swollen(name: str, limits: UploadLimits) -> UploadError:
    return UploadError(
        f"{shown(name)} unpacks to more than {limits.max_ratio} times its packed size, which weights never do; "
        "send it unpacked",
        code="ratio",
    )
