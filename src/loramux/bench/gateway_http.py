"""A small HTTP client for measuring the server: whole answers, streams that can be left or read slowly.

Why not a library's: it must cost less than what it measures, and be able to behave badly. One connection per call.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

COMPLETIONS = "/v1/completions"
DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Stream:
    """An answer under way: `events` yields what server-sent events hold, until the end or until it is left."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader):
        self.status, self.headers, self._reader = status, headers, reader

    async def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            return b"".join([chunk async for chunk in self._chunks()])
        return await self._reader.readexactly(int(self.headers.get("content-length", 0)))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        kept = b""
        async for chunk in self._chunks():
            kept += chunk
            *whole, kept = kept.split(b"\n\n")
            for text in whole:
                if text.startswith(b"data: ") and text != DONE:
                    yield json.loads(text[6:])

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int((await self._reader.readline()).strip() or b"0", 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)


@asynccontextmanager
async def open_call(
    port: int,
    body: Any,
    *,
    path: str = COMPLETIONS,
    method: str = "POST",
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    receive_bytes: int | None = None,
) -> AsyncIterator[Stream]:
    """Send a call and read the head of its answer; leaving the block closes the connection, answered or not.

    body: JSON, bytes as they are, or None. receive_bytes: a small buffer makes a slow reader felt at once.
    """
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**20)
    except BaseException:
        sock.close()
        raise
    try:
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        lines = {
            "Host": "127.0.0.1",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **({} if key is None else {"Authorization": f"Bearer {key}"}),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        await writer.drain()
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        named = (line.partition(":") for line in rest if line)
        found = {name.strip().lower(): value.strip() for name, _, value in named}
        yield Stream(int(first.split(" ", 2)[1]), found, reader)
    finally:
        writer.close()


async def ask(port: int, body: Any = None, **how: Any) -> Reply:
    """One whole call; `how` as in `open_call`."""
    async with open_call(port, body, **how) as answer:
        return Reply(answer.status, answer.headers, await answer.body())


async def get(port: int, path: str, **how: Any) -> Reply:
    return await ask(port, path=path, method="GET", **how)


def quantile(values: list[float], share: float) -> float:
    """The value that this share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
