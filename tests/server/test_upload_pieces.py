"""A multipart body is the same form however it is cut into pieces, and in whatever order its parts come."""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loramux.server import uploads
from loramux.server.uploads import received

EDGE = "edge"
FILE = bytes(range(256)) * 4


class Sent:
    """A request whose body comes in pieces of `size` bytes."""

    def __init__(self, body: bytes, size: int):
        self.headers = {"content-type": f"multipart/form-data; boundary={EDGE}"}
        self._body, self._size = body, size

    async def stream(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), self._size):
            yield self._body[start : start + self._size]


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    head = f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + data + b"\r\n"


@pytest.mark.parametrize("size", [1, 7, 64, 500, 1000, 1200, 10**6])
@pytest.mark.parametrize("order", ["file first", "file between", "file last"])
def test_the_form_does_not_depend_on_where_the_body_is_cut(size: int, order: str) -> None:
    file, name, samples = (
        part("file", FILE, "a.zip"), part("name", b"law"), part("samples", b"[1]" * 100),
    )  # fmt: skip
    parts = {
        "file first": [file, name, samples],
        "file between": [name, file, samples],
        "file last": [name, samples, file],
    }[order]
    body = b"".join(parts) + f"--{EDGE}--\r\n".encode()

    async def read() -> tuple[dict[str, str], list[tuple[str, str, bytes]]]:
        request: Any = Sent(body, size)
        async with received(request, 10**6, 10.0) as form:
            files = [(field, filename, path.read_bytes()) for field, filename, path in form.files]
            return form.fields, files

    fields, files = asyncio.run(read())
    assert fields == {"name": "law", "samples": "[1]" * 100}
    assert files == [("file", "a.zip", FILE)]


@pytest.mark.parametrize("at", ["the folder is made", "a file is written", "the block runs"])
def test_an_upload_that_is_cancelled_leaves_nothing_however_slow_the_disk_is(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def slowly(inner: Any) -> Any:
        def call(*given: Any) -> Any:
            reached.set()
            assert go_on.wait(20)
            return inner(*given)

        return call

    if at == "the folder is made":
        monkeypatch.setattr(tempfile, "mkdtemp", slowly(tempfile.mkdtemp))
    elif at == "a file is written":
        monkeypatch.setattr(uploads._Reader, "_write", slowly(uploads._Reader._write))

    async def read() -> None:
        request: Any = Sent(part("file", FILE, "a.zip") + f"--{EDGE}--\r\n".encode(), 10**6)
        async with received(request, 10**6, 10.0, tmp_path) as form:
            write = slowly((form.home / "unpacked").write_bytes)
            await uploads.to_the_end(lambda: write(b"x"))

    async def main() -> None:
        task = asyncio.ensure_future(read())
        assert await asyncio.to_thread(reached.wait, 20)
        task.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []
