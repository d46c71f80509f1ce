"""One connection, fed by hand: what counts as a head, and what happens to requests sent before the first is answered.

Why without sockets: what arrives together and what apart decides, and a socket joins and splits as it likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from loramux.server import connections
from loramux.server.connections import HEAD_BYTES, MAX_AHEAD, protocol_of
from server.rig import config

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Wire(asyncio.Transport):
    """What a connection writes, and whether it is read from."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.is_over, self.is_read = b"", False, True

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


class App:
    """Answers when it is told to; notes who was told that the client is gone."""

    def __init__(self) -> None:
        self.may_answer, self.answered, self.left = asyncio.Event(), 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        gone, told = asyncio.ensure_future(receive()), asyncio.ensure_future(self.may_answer.wait())
        await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if gone.done():
            self.left += 1
            return
        gone.cancel()
        self.answered += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def over_a_wire(work: Callable[[Any, Wire, App], Any], clock: Clock | None = None) -> None:
    async def run() -> None:
        app, wire = App(), Wire()
        settings = uvicorn.Config(
            app, http=protocol_of(config().limits, clock or Clock()), log_level="error"
        )
        settings.load()
        state = ServerState()
        connection = settings.http_protocol_class(settings, state, {})  # type: ignore[operator, union-attr]
        connection.connection_made(wire)
        try:
            await work(connection, wire, app)
        finally:
            connection.connection_lost(None)
            app.may_answer.set()
            await asyncio.gather(*state.tasks, return_exceptions=True)

    asyncio.run(run())


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# --- Heads ------------------------------------------------------------------------------------------


def test_heads_of_one_connection_are_not_added_up() -> None:
    async def work(connection: Any, wire: Wire, app: App) -> None:
        app.may_answer.set()
        padding = b"X: " + b"x" * 4000 + b"\r\n"
        for _ in range(2 * HEAD_BYTES // len(padding)):
            connection.data_received(GET[:-2] + padding)
            connection.data_received(b"\r\n")
            await turns()
        assert b" 431 " not in wire.written and not wire.is_over

    over_a_wire(work)


def test_many_whole_requests_that_arrive_at_once_are_no_long_head() -> None:
    async def work(connection: Any, wire: Wire, app: App) -> None:
        connection.data_received(GET * (HEAD_BYTES // len(GET) + 10))
        assert b" 431 " not in wire.written and not wire.is_over

    over_a_wire(work)


def test_what_chunks_say_of_themselves_counts_from_one_piece_of_body_to_the_next() -> None:
    chunk = b"2;" + b"e" * 4000 + b"\r\n"

    async def work(connection: Any, wire: Wire, app: App) -> None:
        connection.data_received(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(2 * HEAD_BYTES // len(chunk)):
            connection.data_received(chunk)
            connection.data_received(b"{}\r\n")
        assert not wire.is_over
        for _ in range(HEAD_BYTES // len(chunk) + 1):
            assert not wire.is_over
            connection.data_received(chunk[2:-2] if _ else chunk[:-2])
        assert b" 431 " in wire.written and wire.is_over

    over_a_wire(work)


def test_the_time_of_an_answer_is_not_counted_as_silence_before_the_next_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "LOOK_S", 0.001)
    clock = Clock()

    async def work(connection: Any, wire: Wire, app: App) -> None:
        connection.data_received(GET)
        await turns()
        clock.now += 1000.0
        app.may_answer.set()
        await asyncio.sleep(0.05)
        assert app.answered == 1 and not wire.is_over
        clock.now += config().limits.head_timeout_s + 1
        await asyncio.sleep(0.05)
        assert b" 408 " in wire.written and wire.is_over

    over_a_wire(work, clock)


# --- Requests sent ahead ----------------------------------------------------------------------------


def test_requests_sent_ahead_are_answered_in_turn() -> None:
    async def work(connection: Any, wire: Wire, app: App) -> None:
        connection.data_received(GET)
        await turns()
        connection.data_received(GET * 3)
        app.may_answer.set()
        for _ in range(5):
            await turns()
        assert app.answered == 4 and wire.written.count(b" 200 ") == 4

    over_a_wire(work)


def test_a_connection_with_few_requests_ahead_is_read_on_so_that_its_end_is_noticed() -> None:
    async def work(connection: Any, wire: Wire, app: App) -> None:
        connection.data_received(GET)
        await turns()  # from here on only what comes could wake the first one
        for _ in range(MAX_AHEAD):
            connection.data_received(GET)
            assert wire.is_read
        connection.data_received(GET)
        assert not wire.is_read  # or one connection could send requests without end

    over_a_wire(work)


def test_answered_requests_no_longer_count_as_ahead() -> None:
    async def work(connection: Any, wire: Wire, app: App) -> None:
        app.may_answer.set()
        for _ in range(2 * MAX_AHEAD):
            connection.data_received(GET * 2)
            await turns()
            await turns()
        app.may_answer.clear()
        connection.data_received(GET)
        await turns()
        connection.data_received(GET)
        assert wire.is_read and len(connection.unanswered) == 1

    over_a_wire(work)


def test_the_end_of_a_connection_is_told_to_the_request_that_runs_although_others_came_after() -> (
    None
):
    async def work(connection: Any, wire: Wire, app: App) -> None:
        connection.data_received(GET)
        await turns()
        connection.data_received(GET * 2)
        connection.connection_lost(None)
        await turns()
        assert app.left == 1 and app.answered == 0 and wire.written == b""

    over_a_wire(work)
