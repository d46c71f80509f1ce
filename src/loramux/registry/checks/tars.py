"""A tar as a list of members; and the refusals that both kinds of archive share.

Why the headers are walked here: `tarfile` reads extended headers of any length into memory, matches them with
expressions that take quadratic time, and follows sizes backwards (CVE-2024-6232, CVE-2025-8194). Its parser for one
header is used; sizes, names and steps are ours.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from loramux.registry.checks.errors import UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.checks.sources import CHUNK, Member
from loramux.registry.names import shown

BLOCK = 512
MAX_EXTENDED = 2**16  # bytes of one extended header


def tar_members(file: BinaryIO, limits: UploadLimits) -> list[Member]:
    size = file.seek(0, os.SEEK_END)
    found: list[Member] = []
    at = headers = 0
    name: str | None = None
    length: int | None = None
    while (info := _tar_header(file, at)) is not None:
        headers += 1
        check_number(headers // 3, limits)  # a member may have two extended headers
        start = at + BLOCK
        own_length = info.size if length is None or _is_extension(info) else length
        if not 0 <= own_length <= size - start:
            raise broken(
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
                raise broken("a global header sets the name or size of every member")
        else:
            own_name = info.name if name is None else name
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                found.append(
                    Member(own_name, lambda at=start, n=own_length: _section(file, at, n))  # type: ignore[misc]
                )
            elif info.type != tarfile.DIRTYPE:
                raise special(own_name)
            name = length = None
            check_number(len(found), limits)
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
        raise broken(error) from None


def is_old_tar(start: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape").name)
    except (tarfile.TarError, ValueError, OverflowError):
        return False


def _extended(file: BinaryIO, start: int, length: int) -> bytes:
    if length > MAX_EXTENDED:
        raise broken(f"an extended header has {length:,} bytes, at most {MAX_EXTENDED:,} are read")
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
            raise broken("a record of an extended header is malformed")
        if key.startswith(b"GNU.sparse"):
            raise broken("it holds a file with holes; pack it without --sparse")
        fields[_text(key)] = _text(value[:-1])
        data = data[length:]
    return fields


def _pax_size(fields: dict[str, str], before: int | None) -> int | None:
    text = fields.get("size")
    if text is None:
        return before
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise broken(f"a member's size is {shown(text)}")
    return int(text)


def _section(file: BinaryIO, at: int, length: int) -> Iterator[bytes]:
    while length:
        file.seek(at)
        chunk = file.read(min(CHUNK, length))
        if not chunk:
            raise broken("it ends in the middle of a member")
        at, length = at + len(chunk), length - len(chunk)
        yield chunk


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def check_number(number: int, limits: UploadLimits) -> None:
    if number > limits.max_members:
        raise UploadError(
            f"the archive holds more than the {limits.max_members:,} members that are allowed; pack the adapter's "
            "folder only",
            code="too_many_files",
        )


def special(name: str) -> UploadError:
    return UploadError(
        f"{shown(name)} is a link, a device or another special member; pack plain files (tar: --dereference)",
        code="archive_link",
    )


def broken(why: object) -> UploadError:
    return UploadError(
        f"the archive cannot be read: {why}. Pack the adapter's folder again", code="bad_archive"
    )
