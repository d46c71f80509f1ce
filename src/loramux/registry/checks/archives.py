"""Zip and tar as lists of members: nothing is extracted, links and devices are refused, every read is bounded.

Why the tar headers are walked here: `tarfile` reads extended headers of any length into memory, matches them with
expressions that take quadratic time, and follows sizes backwards (CVE-2024-6232, CVE-2025-8194). Its parser for one
header is used; sizes, names and steps are ours.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
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
from loramux.registry.names import shown

BLOCK = 512  # of a tar
MAX_EXTENDED = 2**16  # bytes of one extended header
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
                    yield _tar_members(plain, limits)
            elif start[257:262] == b"ustar" or _is_old_tar(start):
                yield _tar_members(file, limits)
            else:
                raise UploadError(
                    f"this is neither a zip nor a tar (it begins with {start[:8].hex(' ')}); send .zip, .tar or "
                    ".tar.gz",
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
            raise _broken(f"its directory claims {size:,} bytes, at most {MOST_READ:,} are read")
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
        raise _broken(error) from None
    with parcel:
        yield parcel


def _zip_members(parcel: zipfile.ZipFile, limits: UploadLimits) -> list[Member]:
    entries = parcel.infolist()
    _check_number(len(entries), limits)
    found = []
    for info in entries:
        # What the parser makes of the name ends at a NUL; the one in the file is judged.
        name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
        is_folder = name.endswith("/") and not info.file_size
        if kind not in ((0, stat.S_IFDIR) if is_folder else (0, stat.S_IFREG)):
            raise _special(name)
        if info.flag_bits & 0x1:
            raise UploadError(f"{shown(name)} needs a password; pack it without", code="encrypted")
        if info.compress_type not in _PLAIN_METHODS:
            raise _broken(f"{shown(name)} is packed with method {info.compress_type}; use deflate")
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
        raise _broken(f"{shown(info.orig_filename)}: {error}") from None


def _gunzip(file: BinaryIO, out: BinaryIO, size: int, limits: UploadLimits) -> None:
    """One gzip stream to a file. Not GzipFile: it reads a header's file name one byte at a time, however long."""
    stream, written = zlib.decompressobj(wbits=31), 0
    for chunk in pieces(file):
        while chunk:
            if stream.eof:
                raise _broken("there is something behind the end of the gzip stream")
            try:
                plain = stream.decompress(chunk, CHUNK)
            except zlib.error as error:
                raise _broken(error) from None
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
        raise _broken("it ends in the middle of the gzip stream")


def _tar_members(file: BinaryIO, limits: UploadLimits) -> list[Member]:
    size = file.seek(0, os.SEEK_END)
    found: list[Member] = []
    at = headers = 0
    name: str | None = None
    length: int | None = None
    while (info := _tar_header(file, at)) is not None:
        headers += 1
        _check_number(headers // 3, limits)  # a member may have two extended headers
        start = at + BLOCK
        own_length = info.size if length is None or _is_extension(info) else length
        if not 0 <= own_length <= size - start:
            raise _broken(
                f"{shown(info.name)} claims {own_length:,} bytes, {size - start:,} are left"
            )
        at = start + -(-own_length // BLOCK) * BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(_extended(file, start, own_length).rstrip(b"\0"))
        elif info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            fields = _pax(_extended(file, start, own_length))
            if info.type == tarfile.XHDTYPE:
                name, length = fields.get("path", name), _pax_size(fields, length)
            elif {"path", "size"} & fields.keys():
                raise _broken("a global header sets the name or size of every member")
        else:
            own_name = info.name if name is None else name
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                found.append(
                    Member(own_name, lambda at=start, n=own_length: _section(file, at, n))  # type: ignore[misc]
                )
            elif info.type != tarfile.DIRTYPE:
                raise _special(own_name)
            name = length = None
            _check_number(len(found), limits)
    return found


def _is_extension(info: tarfile.TarInfo) -> bool:
    return info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def _tar_header(file: BinaryIO, at: int) -> tarfile.TarInfo | None:
    file.seek(at)
    block = file.read(BLOCK)
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _broken(error) from None


def _is_old_tar(start: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape").name)
    except (tarfile.TarError, ValueError, OverflowError):
        return False


def _extended(file: BinaryIO, start: int, length: int) -> bytes:
    if length > MAX_EXTENDED:
        raise _broken(f"an extended header has {length:,} bytes, at most {MAX_EXTENDED:,} are read")
    file.seek(start)
    return file.read(length)


def _pax(data: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    fields: dict[str, str] = {}
    while data.strip(b"\0"):
        digits, blank, _ = data[:8].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _broken("a record of an extended header is malformed")
        if key.startswith(b"GNU.sparse"):
            raise _broken("it holds a file with holes; pack it without --sparse")
        fields[_text(key)] = _text(value[:-1])
        data = data[length:]
    return fields


def _pax_size(fields: dict[str, str], before: int | None) -> int | None:
    text = fields.get("size")
    if text is None:
        return before
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _broken(f"a member's size is {shown(text)}")
    return int(text)


def _section(file: BinaryIO, at: int, length: int) -> Iterator[bytes]:
    while length:
        file.seek(at)
        chunk = file.read(min(CHUNK, length))
        if not chunk:
            raise _broken("it ends in the middle of a member")
        at, length = at + len(chunk), length - len(chunk)
        yield chunk


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _check_number(number: int, limits: UploadLimits) -> None:
    if number > limits.max_members:
        raise UploadError(
            f"the archive holds more than the {limits.max_members:,} members that are allowed; pack the adapter's "
            "folder only",
            code="too_many_files",
        )


def _special(name: str) -> UploadError:
    return UploadError(
        f"{shown(name)} is a link, a device or another special member; pack plain files (tar: --dereference)",
        code="archive_link",
    )


def _swollen(name: str, limits: UploadLimits) -> UploadError:
    return UploadError(
        f"{shown(name)} unpacks to more than {limits.max_ratio} times its packed size, which weights never do; "
        "send it unpacked",
        code="ratio",
    )


def _broken(why: object) -> UploadError:
    return UploadError(
        f"the archive cannot be read: {why}. Pack the adapter's folder again", code="bad_archive"
    )
