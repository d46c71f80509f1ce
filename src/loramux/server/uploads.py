"""A multipart upload, read as it comes: files to a folder of ours under names of ours, fields to memory, all counted.

Why not the framework's form: it has no cap on the bytes of a file, and leaves its temporary files to the collector
when a body breaks off. Here the cap holds while reading, and the folder is gone when the block ends, however.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import collapse_rfc2231_value
from pathlib import Path
from typing import BinaryIO, TypeVar

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from loramux.server.errors import ApiError

T = TypeVar("T")
PREFIX = "loramux-upload-"
MAX_PARTS = 2048
FIELD_BYTES = 4 * 2**20  # of all fields together: samples are the large one
HEADER_BYTES = 4096  # of one part
FRAME_BYTES = 2**20  # what boundaries and part headers may add to the files
STALE_S = 24 * 3600.0


@dataclass
class Form:
    """What was sent. `files`: (field, file name as given, where it lies). `home`: gone with the form."""

    home: Path
    fields: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, str, Path]] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(eq=False)
class _Part:
    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    path: Path | None = None
    data: bytearray = field(default_factory=bytearray)


class UploadSlots:
    """How many uploads may be under way at once; used by one event loop only."""

    def __init__(self, most: int = 8, most_per_tenant: int = 2) -> None:
        self.most, self.most_per_tenant = most, most_per_tenant
        self._held: dict[str, int] = {}

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        mine = self._held.get(tenant, 0)
        if mine >= self.most_per_tenant or sum(self._held.values()) >= self.most:
            raise ApiError(
                "too many uploads are under way; try again when one has ended",
                code="too_many_uploads",
                status=429,
                headers={"Retry-After": "2"},
            )
        self._held[tenant] = mine + 1
        try:
            yield
        finally:
            left = self._held[tenant] - 1
            self._held = {**self._held, tenant: left}
            if not left:
                del self._held[tenant]


@asynccontextmanager
async def received(
    request: Request, max_bytes: int, timeout_s: float, folder: Path | None = None
) -> AsyncIterator[Form]:
    """The form of a request; its files are gone when the block ends. ApiError for what is no multipart form."""
    given = request.headers.get("content-length", "")
    if given.isdigit() and int(given) > max_bytes + FRAME_BYTES:
        raise _too_large(max_bytes)
    boundary = _boundary(request)
    made: list[str] = []
    try:
        await to_the_end(lambda: made.append(tempfile.mkdtemp("", PREFIX, folder)))
        reader = _Reader(Path(made[0]), boundary, max_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    await reader.take(chunk)
        except TimeoutError:
            raise ApiError(
                f"the upload took longer than {timeout_s:g} s", code="upload_timeout", status=408
            ) from None
        finally:
            reader.close()
        yield reader.end()
    finally:
        for home in made:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, home, True))


async def to_the_end(work: Callable[[], T]) -> T:
    """What a thread returns. Who is cancelled waits for it as well, or it would write into a folder that is going."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def sweep(folder: Path | None = None, older_s: float = STALE_S) -> int:
    """Remove what a killed process left; returns how many."""
    home = Path(folder or tempfile.gettempdir())
    found = 0
    for path in home.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if (
                path.is_dir()
                and not path.is_symlink()
                and time.time() - path.stat().st_mtime > older_s
            ):
                shutil.rmtree(path)
                found += 1
    return found


class _Reader:
    """Feeds a push parser, and writes what it found between two pieces of the body."""

    def __init__(self, home: Path, boundary: bytes, max_bytes: int) -> None:
        self._home, self._max_bytes = home, max_bytes
        self._form, self._part = Form(home), _Part()
        self._file: BinaryIO | None = None
        self._header, self._value = bytearray(), bytearray()
        self._seen = self._num_parts = self._field_bytes = self._header_bytes = 0
        self._is_over = False
        self._pieces: list[tuple[str, bytes]] = []
        self._parser = MultipartParser(
            boundary,
            callbacks={
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._on_header(
                    self._header, data[start:end]
                ),
                "on_header_value": lambda data, start, end: self._on_header(
                    self._value, data[start:end]
                ),
                "on_header_end": self._on_header_end,
                "on_headers_finished": lambda: self._pieces.append(("begin", b"")),
                "on_part_data": lambda data, start, end: self._pieces.append(
                    ("data", data[start:end])
                ),
                "on_part_end": lambda: self._pieces.append(("end", b"")),
                "on_end": self._on_end,
            },
        )

    async def take(self, chunk: bytes) -> None:
        self._seen += len(chunk)
        if self._seen > self._max_bytes + FRAME_BYTES:
            raise _too_large(self._max_bytes)
        if not chunk:
            return
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _bad_form(str(error)) from None
        pieces, self._pieces = self._pieces, []
        # A disk can be slow; the event loop must not wait for it.
        await to_the_end(lambda: self._write(pieces))

    def end(self) -> Form:
        if not self._is_over:
            raise _bad_form("it ends before its last boundary")
        return self._form

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- Called by the parser -------------------------------------------------------------------

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        self._header_bytes = 0
        if self._num_parts > MAX_PARTS:
            raise _bad_form(f"it has more than {MAX_PARTS} parts")

    def _on_header(self, into: bytearray, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > HEADER_BYTES:
            raise _bad_form(f"the headers of a part exceed {HEADER_BYTES} bytes")
        into += data

    def _on_header_end(self) -> None:
        name = self._header.decode("latin-1").lower()
        if name == "content-disposition":
            self._pieces.append(("disposition", bytes(self._value)))
        self._header.clear()
        self._value.clear()

    def _on_end(self) -> None:
        self._is_over = True

    # --- In a thread, between two pieces ---------------------------------------------------------

    def _write(self, pieces: list[tuple[str, bytes]]) -> None:
        for kind, data in pieces:
            if kind == "disposition":
                self._part = _Part()
                self._part.name, self._part.filename = _disposition(data)
            elif kind == "begin":
                self._begin()
            elif kind == "data":
                self._keep(data)
            else:
                self._finish()

    def _begin(self) -> None:
        part = self._part
        if not part.name:
            raise _bad_form("a part has no name")
        if part.filename is not None:
            part.path = self._home / f"part-{len(self._form.files)}"
            self._file = part.path.open("xb")

    def _keep(self, data: bytes) -> None:
        if self._file is not None:
            self._form.num_bytes += len(data)
            if self._form.num_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            self._file.write(data)
            return
        self._field_bytes += len(data)
        if self._field_bytes > FIELD_BYTES:
            raise ApiError(f"the fields exceed {FIELD_BYTES} bytes", code="too_large")
        self._part.data += data

    def _finish(self) -> None:
        part, form = self._part, self._form
        self.close()
        if part.path is not None:
            form.files.append((part.name, part.filename or "", part.path))
        elif part.name in form.fields:
            raise _bad_form(f"the field {part.name[:40]!r} is given twice")
        else:
            try:
                form.fields[part.name] = part.data.decode("utf-8")
            except UnicodeDecodeError:
                raise _bad_form(f"the field {part.name[:40]!r} is not UTF-8") from None
        self._part = _Part()


def _disposition(value: bytes) -> tuple[str, str | None]:
    """(name, file name) of a Content-Disposition header."""
    message = Message()
    message["content-disposition"] = _one_line(value.decode("utf-8", "replace"))
    found = [message.get_param(key, header="content-disposition") for key in ("name", "filename")]
    name, filename = (None if item is None else collapse_rfc2231_value(item) for item in found)
    return name or "", filename


def _one_line(text: str) -> str:
    """A header's value that cannot become two headers."""
    return " ".join(text.splitlines())


def _boundary(request: Request) -> bytes:
    message = Message()
    message["content-type"] = _one_line(request.headers.get("content-type", ""))
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise ApiError(
            "an upload is multipart/form-data with `file` (zip, tar or tar.gz) or `files`, and `name`",
            code="unsupported_media_type",
            status=415,
        )
    return boundary.encode("latin-1", "replace")


def _bad_form(why: str) -> ApiError:
    return ApiError(f"the multipart body cannot be read: {why}", code="bad_form")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(f"the upload exceeds {max_bytes} bytes", code="too_large")
