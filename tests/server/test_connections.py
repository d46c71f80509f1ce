"""What a connection may cost, over a real server: too many of them, heads that do not come, heads without an end."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from loramux.bench.gateway_http import ask, get
from loramux.bench.gateway_server import Served, in_thread
from loramux.server import asgi, connections
from loramux.server.metrics import KEY
from server.rig import client, config, stub_services

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
BODY = {"model": "base", "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    given = {"max_connections": 4, "head_timeout_s": 0.2, "write_timeout_s": 0.2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connections, "LOOK_S", 0.05)
        with in_thread(tmp_path_factory.mktemp("home"), {"limits": given}, stub=0.0) as found:
            yield found


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that lets silent connections be, however slowly a test gets on."""
    given = {"max_connections": 4, "head_timeout_s": 60}
    with in_thread(tmp_path_factory.mktemp("home"), {"limits": given}, stub=0.0) as found:
        yield found


@contextmanager
def opened(served: Served, count: int) -> Iterator[list[socket.socket]]:
    held = [socket.create_connection(("127.0.0.1", served.port), timeout=5) for _ in range(count)]
    try:
        yield held
    finally:
        for each in held:
            each.close()


def until_closed(sock: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionError):
        while more := sock.recv(65536):
            found += more
    return found


def refused(served: Served) -> Counter[str]:
    """Answers given below the application, by status, as the metrics have them."""
    return Counter(
        {
            sample.labels["status"]: int(sample.value)
            for family in served.services.extras[KEY].registry.collect()
            for sample in family.samples
            if sample.name == "loramux_http_responses_total"
            and (sample.labels["method"], sample.labels["route"]) == ("other", "connection")
        }
    )


def told(answer: bytes) -> tuple[int, str, Any]:
    """(status, head in lower case, error) of an answer that must be in the envelope."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), json.loads(body)["error"]


def test_a_connection_too_many_is_told_when_to_come_again_and_probes_pass(patient: Served) -> None:
    async def calls() -> list[Any]:
        return [await ask(patient.port, BODY), await get(patient.port, "/health")]

    with opened(patient, 4):
        refused, probe = asyncio.run(calls())
    assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
    assert probe.status == 200
    _until(lambda: asyncio.run(ask(patient.port, BODY)).status == 200)  # places are given back


def test_what_is_answered_below_the_application_is_counted_like_any_answer(
    served: Served, patient: Served
) -> None:
    before = refused(served) + refused(patient)
    for sent in (b"", b"\x16\x03\x01 hello\r\n\r\n", HEAD + b"X: " + b"x" * 70_000):
        with opened(served, 1) as (sock,):
            sock.sendall(sent)
            until_closed(sock)
    with opened(patient, 4):
        assert asyncio.run(ask(patient.port, BODY)).status == 503
    assert refused(served) + refused(patient) - before == {"408": 1, "400": 1, "431": 1, "503": 1}


def test_beyond_twice_as_many_connections_are_closed_without_a_word(patient: Served) -> None:
    with opened(patient, 8), opened(patient, 1) as (last,):
        assert until_closed(last) == b""


@pytest.mark.parametrize("sent", [b"", HEAD, b"\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(served: Served, sent: bytes) -> None:
    with opened(served, 1) as (sock,):
        began = time.monotonic()
        sock.sendall(sent)
        status, _, error = told(until_closed(sock))
    assert (status, error["code"]) == (408, "timeout")
    assert time.monotonic() - began < 3


def test_a_second_head_on_a_kept_connection_is_bounded_as_well(served: Served) -> None:
    with opened(served, 1) as (sock,):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + HEAD)
        answer = until_closed(sock)
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in answer


def test_what_is_no_http_is_told_so_in_the_envelope(served: Served) -> None:
    with opened(served, 1) as (sock,):
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, _, error = told(until_closed(sock))
    assert (status, error["code"]) == (400, "invalid_request")


def test_a_head_without_an_end_is_cut_off(served: Served) -> None:
    with opened(served, 1) as (sock,):
        sent = 0
        with suppress(ConnectionError, TimeoutError):
            sock.sendall(HEAD)
            while sent < 2**22:
                sent += sock.send(b"X-Padding: " + b"x" * 4000 + b"\r\n")
        assert sent < 2**22


@pytest.mark.parametrize("line", [b"X-Padding: " + b"x" * 4000 + b"\r\n", b"x" * 4096])
def test_trailers_without_an_end_are_cut_off_as_well(served: Served, line: bytes) -> None:
    with opened(served, 1) as (sock,):
        sent = 0
        with suppress(ConnectionError, TimeoutError):
            sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
            while sent < 2**23:
                sent += sock.send(line)
        assert sent < 2**23


def test_a_long_body_in_small_chunks_is_no_head(served: Served) -> None:
    body = json.dumps({**BODY, "prompt": "x" * 100}).encode().ljust(200_000)
    with opened(served, 1) as (sock,):
        sock.sendall(HEAD + b"Content-Type: application/json\r\nConnection: close\r\n")
        sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(body), 2000):
            sock.sendall(b"7d0;" + b"e" * 2000 + b"\r\n")
            sock.sendall(body[start : start + 2000] + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        answer = until_closed(sock)
    assert answer.startswith(b"HTTP/1.1 200")


def test_who_leaves_with_several_calls_on_one_connection_gives_their_places_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.services.engine, "delay_s", 300.0)
    body = json.dumps(BODY).encode()
    call = HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with opened(served, 1) as (sock,):
        sock.sendall(call * 3)
        _until(lambda: served.services.gate.num_inflight == 1)
    _until(lambda: served.services.gate.num_inflight == 0)
    assert served.services.engine.running == 0


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 2
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_connection_that_cannot_be_looked_at_does_not_end_the_looking(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge, failed = connections._Watch._judge, []

    def once(self: Any, *given: Any) -> None:
        if not failed:
            failed.append(1)
            raise RuntimeError("of a transport")
        judge(self, *given)

    monkeypatch.setattr(connections._Watch, "_judge", once)
    with opened(served, 1) as (sock,):
        assert told(until_closed(sock))[0] == 408
    assert failed and "could not be looked at" in caplog.text


def test_a_body_that_drips_is_refused_although_it_is_never_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "LEAST_RATE", 1000)
    app = client(stub_services(), limits={"read_timeout_s": 0.1}).app
    statuses: list[int] = []

    async def receive() -> Any:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1), "headers": [(b"host", b"127.0.0.1")],
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 3))
    assert statuses == [408]


def test_the_configuration_bounds_heads() -> None:
    assert config().limits.head_timeout_s == 10.0
