"""Streams: silence, slow readers, readers that leave, places given back; and the bounds of the queue."""

import asyncio
import gc
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.engine.aio import EngineClosedError
from loramux.server.app import create_app
from loramux.server.errors import ApiError, as_api_error
from loramux.server.limits import Gate
from loramux.server.loaded import LoadedAdapters
from loramux.server.streams import DONE, HEARTBEAT, EventStream, event
from loramux.server.stub import StubEngine, StubRegistry
from server.rig import LOCAL, client, config, error_of, stub_services


class Reader:
    """One ASGI connection: what was sent, and when it goes away."""

    def __init__(self, *, stuck_after: int | None = None):
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self._stuck_after = stuck_after

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._stuck_after is not None and len(self.sent) >= self._stuck_after:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def ask(app: Any, reader: Reader, *, late: bool = False, **fields: Any) -> None:
    """One streamed call through the whole application, without a socket. late: half of the body never comes."""
    body = json.dumps({"model": "law", "prompt": "x", "stream": True, **fields}).encode()
    first = [
        {
            "type": "http.request",
            "body": body[: len(body) // 2] if late else body,
            "more_body": late,
        }
    ]

    async def receive() -> Any:
        return first.pop() if first else await reader.receive()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "asgi": {"version": "3.0"},
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, reader.send)


def respond(events: Any, **settings: Any) -> EventStream:
    return EventStream(events, {}, **{"heartbeat_s": 0.02, "write_timeout_s": 0.05, **settings})


def test_silence_is_filled_with_comments_that_clients_ignore():
    async def quiet():
        yield event({"a": 1})
        while reader.body.count(HEARTBEAT) < 2:
            await asyncio.sleep(0.001)
        yield DONE

    reader = Reader()

    async def main() -> bytes:
        async with asyncio.timeout(60):
            await respond(quiet())({"type": "http"}, reader.receive, reader.send)
        return reader.body

    body = asyncio.run(main())
    assert [line for line in body.split(b"\n\n") if line and not line.startswith(b":")] == [
        b'data: {"a":1}',
        b"data: [DONE]",
    ]


@pytest.mark.parametrize("way", ["leaves", "stalls"])
def test_a_reader_that_leaves_or_takes_nothing_ends_the_call_and_gives_everything_back(way):
    services = stub_services(engine=StubEngine(delay_s=0.05))
    app = create_app(config(limits={"write_timeout_s": 0.05}), services)

    async def main() -> None:
        reader = Reader(stuck_after=3 if way == "stalls" else None)
        task = asyncio.ensure_future(ask(app, reader, n=10))
        while len(reader.sent) < 3:
            assert not task.done()
            await asyncio.sleep(0.005)
        services.engine.delay_s = 300.0  # of every token from here on: nothing ends by itself
        assert services.engine.running == services.gate.num_inflight == 1
        if way == "leaves":
            reader.gone.set()
        await asyncio.wait_for(task, 1)
        assert services.engine.running == services.gate.num_inflight == 0

    asyncio.run(main())


def test_two_hundred_streams_of_which_some_leave_and_some_stall_leave_nothing_behind():
    services = stub_services(engine=StubEngine(delay_s=0.001))
    app = create_app(
        config(
            limits={"write_timeout_s": 0.2, "max_inflight": 256, "max_inflight_per_tenant": 256}
        ),
        services,
    )

    async def one(place: int) -> Reader:
        reader = Reader(stuck_after=4 if place % 10 == 1 else None)
        task = asyncio.ensure_future(ask(app, reader, n=2))
        if place % 5 == 2:
            await asyncio.sleep(0.02)
            reader.gone.set()
        await task
        return reader

    async def main() -> None:
        counts = []
        for _ in range(3):
            readers = await asyncio.gather(*(one(place) for place in range(200)))
            whole = [r for place, r in enumerate(readers) if place % 10 != 1 and place % 5 != 2]
            assert all(reader.body.endswith(DONE) for reader in whole)
            assert services.engine.running == services.gate.num_inflight == 0
            del readers, whole
            gc.collect()
            counts.append(len(gc.get_objects()))
        assert len(asyncio.all_tasks()) == 1
        assert counts[-1] - counts[1] < 200, counts  # a round is two hundred streams

    asyncio.run(main())


def test_a_body_that_does_not_arrive_is_refused():
    app = create_app(config(limits={"read_timeout_s": 0.02}), stub_services())
    reader = Reader()

    async def main() -> None:
        await asyncio.wait_for(ask(app, reader, late=True), 1)

    asyncio.run(main())
    assert reader.sent[0]["status"] == 408


def test_an_answer_that_takes_too_long_is_ended():
    http = client(stub_services(engine=StubEngine(delay_s=0.05)), limits={"request_timeout_s": 0.1})
    response = http.post("/v1/completions", json={"model": "law", "prompt": "x"})
    assert error_of(response, 504)["code"] == "timeout"
    assert http.app.state.services.gate.num_inflight == 0


def test_the_queue_is_bounded_and_no_tenant_may_fill_it():
    gate = Gate(4, 3)
    held = [gate.enter("a") for _ in range(3)]
    for place in held:
        place.__enter__()
    with pytest.raises(ApiError) as mine:
        gate.enter("a").__enter__()
    assert (mine.value.status, mine.value.headers["Retry-After"]) == (429, "1")
    with gate.enter("b"):
        with pytest.raises(ApiError) as full:
            gate.enter("c").__enter__()
        assert (full.value.status, full.value.code) == (503, "overloaded")
        assert full.value.headers["Retry-After"] == "1"
    for place in held:
        place.__exit__(None, None, None)
    assert gate.num_inflight == gate.inflight_of("a") == 0


def test_a_full_queue_answers_at_once_and_readiness_says_so():
    services = stub_services()
    http = client(services, limits={"max_inflight": 1})
    with services.gate.enter("someone"):
        response = http.post("/v1/completions", json={"model": "law", "prompt": "x"})
        assert error_of(response, 503)["code"] == "overloaded"
        assert response.headers["retry-after"] == "1"
        assert http.get("/ready").status_code == 503
    assert http.get("/ready").status_code == 200


# --- Adapters that the engine knows -----------------------------------------------------------------


class V:
    def __init__(self, digest: str):
        self.digest = digest


def test_adapters_are_given_to_the_engine_once_and_taken_back_unless_in_use():
    engine = StubEngine()
    asked: list[str] = []

    def folder(version: V) -> str:
        asked.append(version.digest)
        return f"folder-{version.digest}"

    async def main() -> None:
        loaded = LoadedAdapters(engine, folder, limit=2)

        async def use(*digests: str) -> None:
            async with loaded.pinned([V(digest) for digest in digests]):
                assert set(digests) <= set(engine.folders)

        await asyncio.gather(*(use("a", "b") for _ in range(20)))
        assert sorted(asked) == ["a", "b"]
        async with loaded.pinned([V("a")]):
            await use("c")
            await use("d")
            assert "a" in engine.folders and len(engine.folders) == 2
        await use("e")
        assert len(loaded) == len(engine.folders) == 2 and "e" in loaded

    asyncio.run(main())


def test_an_adapter_that_cannot_be_read_is_tried_again_by_the_next_call():
    engine = StubEngine()
    tries: list[str] = []

    def folder(version: V) -> str:
        tries.append(version.digest)
        if len(tries) == 1:
            raise OSError("gone")
        return "folder"

    async def main() -> None:
        loaded = LoadedAdapters(engine, folder, limit=2)
        with pytest.raises(OSError, match="gone"):
            async with loaded.pinned([V("a")]):
                pass
        async with loaded.pinned([V("a")]):
            pass

    asyncio.run(main())
    assert engine.folders == {"a": "folder"}


def test_an_engine_that_was_shut_down_meanwhile_is_no_fault_of_the_call():
    """Regression: a call whose adapter was being read was told `this cannot be done as asked`, with 400; and one that
    had been answered failed where its adapter was to be taken back."""
    engine = StubEngine()

    async def closed(_: Any) -> None:
        raise EngineClosedError("the engine is shut down")

    async def main() -> None:
        loaded = LoadedAdapters(engine, lambda version: "folder", limit=0)
        async with loaded.pinned([V("a")]):
            engine.call = closed
        with pytest.raises(EngineClosedError) as caught:
            async with loaded.pinned([V("b")]):
                pass
        told = as_api_error(caught.value)
        assert (told.status, told.code, str(told)) == (503, "overloaded", "the server is stopping")

    asyncio.run(main())


def test_what_fails_at_the_end_keeps_nothing_else_from_being_closed():
    """Regression: an engine that could not be shut down left the tenants' ledger unwritten."""
    closed = []

    class Engine(StubEngine):
        async def shutdown(self, *, finish: bool = True) -> None:
            raise RuntimeError("the books do not add up")

    class Part(StubRegistry):
        def close(self) -> None:
            closed.append(self)

    services = stub_services(engine=Engine(), registry=Part())
    served = create_app(config(), services)
    services.tenancy = Part()  # its ledger goes into the registry's database, so it is first
    with pytest.raises(RuntimeError, match="books"), TestClient(served, base_url=LOCAL):
        pass
    assert closed == [services.tenancy, services.registry]
