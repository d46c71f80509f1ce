"""What one connection may cost: how many are open, how long and how large a head is, how slowly an answer is read.

Why below the application: a client that opens connections and says nothing, or a head a byte at a time, never reaches
it. One look at all connections a second replaces a timer for each of them.

The protocol itself is uvicorn's, with httptools where that is installed; httptools does not bound a head's size.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from loramux.server.config import LimitsConfig
from loramux.server.errors import envelope
from loramux.server.limits import PROBES, RETRY_S

log = logging.getLogger(__name__)
HEAD_BYTES = 64 * 1024  # request line and headers
LOOK_S = 1.0
MAX_AHEAD = 8  # requests of one connection sent before the first is answered, until no more is read
HARD = 2  # times max_connections: beyond it a connection is closed without a word


def protocol_of(
    limits: LimitsConfig,
    clock: Callable[[], float] = time.monotonic,
    on_refusal: Callable[[int], None] | None = None,
) -> Any:
    """The class of a server's connections, for `uvicorn.Config(http=...)`. One server may use it.

    `on_refusal(status)` is told of each answer that is given here, which no application sees.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    watch = _Watch(limits, clock, on_refusal or _nobody)
    base: Any = AutoHTTPProtocol

    class Bounded(base):  # type: ignore[misc]
        """One connection. `since`: when it began to wait for a head."""

        since = 0.0
        # Since a request's first byte or its last piece of body: head, trailers, what chunks say of themselves.
        is_in_request = has_body = False
        loose_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.since = clock()
            self.unanswered: list[Any] = []  # whose answers later requests wait for
            watch.arrived(self)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for cycle in self.unanswered:  # uvicorn tells the last one only
                cycle.disconnected = not cycle.response_complete
                cycle.message_event.set()

        def on_response_complete(self) -> None:
            self.since = clock()
            super().on_response_complete()

        # httptools calls these; h11 bounds heads and trailers itself.
        def on_message_begin(self) -> None:
            self.is_in_request, self.loose_bytes = True, 0
            super().on_message_begin()

        def on_body(self, body: bytes) -> None:
            self.has_body, self.loose_bytes = True, 0
            super().on_body(body)

        def on_headers_complete(self) -> None:
            before = self.cycle
            super().on_headers_complete()
            if before is not None and not before.response_complete:
                self.unanswered = [c for c in self.unanswered if not c.response_complete] + [before]
                if len(self.unanswered) <= MAX_AHEAD:
                    self.flow.resume_reading()  # else nobody notices that the client goes away

        def on_message_complete(self) -> None:
            self.is_in_request = False
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            watch.refuse(self.transport, 400, "this is no valid HTTP request", "invalid_request")

        def data_received(self, data: bytes) -> None:
            self.has_body = False
            super().data_received(data)
            if self.is_in_request and not self.has_body and not self.transport.is_closing():
                self.loose_bytes += len(data)
                if self.loose_bytes > HEAD_BYTES:
                    said = f"the head exceeds {HEAD_BYTES} bytes"
                    watch.refuse(self.transport, 431, said, "too_large")

    return Bounded


class _Watch:
    """Counts the connections of one server and looks through them while there are any."""

    def __init__(
        self, limits: LimitsConfig, clock: Callable[[], float], tell: Callable[[int], None]
    ) -> None:
        self._limits, self._clock, self._tell = limits, clock, tell
        self._is_looking = False

    def arrived(self, connection: Any) -> None:
        num, most = len(connection.connections), self._limits.max_connections
        if num > HARD * most:
            connection.transport.abort()
        elif num > most:
            connection.app = _Refusing(connection.app, self._tell)
        if not self._is_looking:
            self._is_looking = True
            connection.loop.call_later(LOOK_S, self._look, connection.loop, connection.connections)

    def refuse(self, transport: Any, status: int, message: str, code: str) -> None:
        """Answer a request that never became one, and close."""
        refuse(transport, status, message, code)
        self._tell(status)

    def _look(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        now = self._clock()
        for connection in list(connections):
            try:
                self._judge(connection, now - connection.since)
            except Exception:  # or it would be the last look at all others
                log.exception("a connection could not be looked at")
        self._is_looking = bool(connections)
        if connections:
            loop.call_later(LOOK_S, self._look, loop, connections)

    def _judge(self, connection: Any, waited_s: float) -> None:
        cycle, transport = connection.cycle, connection.transport
        if cycle is not None and not cycle.response_complete:
            return  # the application bounds what is under way
        if transport.get_write_buffer_size():
            if waited_s > self._limits.write_timeout_s:
                transport.abort()  # an answer that nobody takes
        elif transport.is_closing():
            return
        elif waited_s > self._limits.head_timeout_s:
            self.refuse(transport, 408, "the request's head did not arrive in time", "timeout")


class _Refusing:
    """In the application's place on a connection too many: probes pass, the rest is told when to come again."""

    def __init__(self, app: Any, tell: Callable[[int], None]) -> None:
        self._app, self._tell = app, tell

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        body = _body(503, "the server has too many connections; try again shortly", "overloaded")
        headers = [(name.lower().encode(), value.encode()) for name, value in _head(503, body)]
        self._tell(503)
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _nobody(status: int) -> None:
    """Told of refusals where nobody counts them."""


def refuse(transport: Any, status: int, message: str, code: str) -> None:
    """Write such an answer and close."""
    body = _body(status, message, code)
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in _head(status, body)]
    transport.write("\r\n".join([*lines, "", ""]).encode() + body)
    transport.close()


def _body(status: int, message: str, code: str) -> bytes:
    return json.dumps(envelope(status, message, code)).encode()


def _head(status: int, body: bytes) -> list[tuple[str, str]]:
    found = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    return [*found, ("Retry-After", str(RETRY_S))] if status == 503 else found
