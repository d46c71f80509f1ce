"""Server-sent events: chunks as they come, a comment in silence, and an end as soon as nobody reads.

Why a response class of our own: the status must wait for the first token (an error before it is a plain error), a
reader that is gone or too slow must end the call at once, and silence must not look like a dead connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response

from loramux.errors import LoramuxError
from loramux.server.errors import ApiError, as_api_error, envelope, response_of

try:
    import orjson
except ImportError:  # slower, and the same
    orjson = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def to_json(value: Any) -> bytes:
    """Compact JSON."""
    if orjson is not None:
        with suppress(TypeError):  # numbers beyond 64 bits, half of a surrogate pair
            return bytes(orjson.dumps(value))
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields; closes it however the response ends. Used once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        *,
        heartbeat_s: float,
        write_timeout_s: float,
        timeout_s: float = 3600.0,
    ):
        super().__init__(
            status_code=200,
            headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers},
        )
        del self.headers["content-length"]
        self._events = events
        self._heartbeat_s, self._write_timeout_s = heartbeat_s, write_timeout_s
        self._timeout_s = timeout_s

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(scope, receive, send))
        except ClientGone:
            log.debug("a reader went away")
        finally:
            await self._events.aclose()

    async def _send_all(self, scope: Any, receive: Receive, send: Send) -> None:
        is_started = False
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout_s
        upcoming: asyncio.Future[bytes | None] = asyncio.ensure_future(self._next())
        try:
            while True:
                done, _ = await asyncio.wait([upcoming], timeout=self._heartbeat_s)
                try:
                    if clock() > deadline:
                        raise timed_out()
                    chunk = upcoming.result() if done else HEARTBEAT
                except LoramuxError as error:
                    if not is_started:
                        await response_of(error)(scope, receive, send)
                        return
                    await self._write(
                        send,
                        {"type": "http.response.body", "body": _as_event(error), "more_body": True},
                    )
                    chunk = None
                except Exception as error:
                    if not is_started:
                        raise
                    # Headers are out: all that is left is to say so in the stream.
                    log.error("a stream failed", exc_info=error)
                    failed = event(
                        envelope(500, "the server failed; its log says why", "internal_error")
                    )
                    await self._write(
                        send,
                        {"type": "http.response.body", "body": failed + DONE, "more_body": True},
                    )
                    chunk = None
                if chunk is None:
                    break
                if not is_started:
                    await self._write(
                        send,
                        {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
                    )
                    is_started = True
                await self._write(
                    send, {"type": "http.response.body", "body": chunk, "more_body": True}
                )
                if done:
                    upcoming = asyncio.ensure_future(self._next())
            await self._write(send, {"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if not upcoming.done():
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)

    async def _next(self) -> bytes | None:
        return await anext(self._events, None)

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)
        except TimeoutError:
            log.info("a reader took nothing for %.0f s and was cut off", self._write_timeout_s)
            raise ClientGone from None
        except OSError:
            raise ClientGone from None


def timed_out() -> ApiError:
    """A call that took longer than the server allows."""
    return ApiError("the answer took too long and was ended", code="timeout", status=504)


def _as_event(error: LoramuxError) -> bytes:
    found = as_api_error(error)
    return event(envelope(found.status, str(found), found.code, found.param)) + DONE


async def unless_gone(receive: Receive, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client disconnects; that is ClientGone then."""
    # In this task and not in one of its own, which would cost a tenth of a short call.
    task = asyncio.current_task()
    assert task is not None
    is_gone = is_over = False

    def left(watched: asyncio.Future[None]) -> None:
        nonlocal is_gone
        if not watched.cancelled():
            watched.exception()  # whatever it is, nothing can be read any more
            if not is_over:
                is_gone = True
                task.cancel()

    watching = asyncio.ensure_future(_gone(receive))
    watching.add_done_callback(left)
    try:
        return await work
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        is_over = True
        watching.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
