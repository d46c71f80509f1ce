"""The short way to the two inference routes answers as FastAPI's own way does, and refuses before it reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from loramux.formats.errors import FormatError
from loramux.formats.jsonio import canonical_json
from loramux.registry import Registry
from loramux.server import express, receipts, streams
from loramux.server.app import create_app
from loramux.server.receipts import canonical_of_ours
from loramux.server.tally import Tallies
from loramux.tenancy import Tenancy
from loramux.tenancy.caller import Limits
from server.rig import client, config, stub_services

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TURN = [{"role": "user", "content": "hi"}]
JSON = "application/json"
CASES: list[tuple[str, str | None, bytes]] = [
    (path, kind, json.dumps(body).encode())
    for kind in (JSON,)
    for path, body in (
        (COMPLETIONS, {"model": "local/law", "prompt": "hello", "max_tokens": 3}),
        (COMPLETIONS, {"model": "local/law", "prompt": ["a", "b"], "n": 2, "logprobs": 1}),
        (COMPLETIONS, {"model": "local/none", "prompt": "hello"}),
        (COMPLETIONS, {"model": "base"}),
        (COMPLETIONS, {"model": "base", "prompt": "x", "temperature": 9}),
        (COMPLETIONS, {"model": "base", "prompt": "x", "max_tokens": "3"}),
        (COMPLETIONS, {"model": "base", "prompt": "x", "frobnicate": 1}),
        (COMPLETIONS, {"model": "base", "prompt": {"a": 1}}),
        (COMPLETIONS, ["model"]),
        (COMPLETIONS, 7),
        (COMPLETIONS, None),
        (CHAT, {"model": "local/tone", "messages": TURN, "max_tokens": 3}),
        (CHAT, {"model": "base", "messages": TURN, "stream": True}),
        (CHAT, {"model": "base", "messages": []}),
        (CHAT, {"model": "base", "messages": [{"role": "tool", "content": "x"}]}),
    )
]
CASES += [
    (COMPLETIONS, JSON, b""),
    (COMPLETIONS, JSON, b"{"),
    (COMPLETIONS, JSON, b'{"model": "base", "prompt": "\\ud800"}'),
    (COMPLETIONS, JSON, b"\xff\xfe\x00"),
    (COMPLETIONS, JSON, b"[" * 100_000),
    (COMPLETIONS, JSON, b'{"model": "base", "prompt": "x", "temperature": NaN}'),
    (COMPLETIONS, "text/plain", b'{"model": "base", "prompt": "x"}'),
    (COMPLETIONS, "application/vnd.api+json; charset=utf-8", b'{"model":"base","prompt":"x"}'),
    (COMPLETIONS, None, b'{"model": "base", "prompt": "x"}'),
]


def plain(answer: Any) -> Any:
    """What must be the same: not ids and times."""
    if not answer.headers["content-type"].startswith(JSON):
        lines = answer.text.splitlines()
        return answer.status_code, [json.loads(x[6:])["choices"] for x in lines if x[6:7] == "{"]
    body = answer.json()
    return answer.status_code, {
        key: body.get(key) for key in ("choices", "usage", "model", "error")
    }


@pytest.fixture(scope="module")
def ways() -> tuple[Any, Any]:
    """(a client of the short way, one of FastAPI's)."""
    with pytest.MonkeyPatch.context() as patched:
        quick = client()
        assert quick.post(COMPLETIONS, json={"model": "base", "prompt": "x"}).status_code == 200

        async def past(self: Any, scope: Any, receive: Any, send: Any) -> None:
            await self._app(scope, receive, send)

        class Past(express.Express):
            __call__ = past

        patched.setattr("loramux.server.app.Express", Past)
        slow = client()
        assert slow.post(COMPLETIONS, json={"model": "base", "prompt": "x"}).status_code == 200
    return quick, slow


@pytest.mark.parametrize("case", range(len(CASES)))
def test_both_ways_answer_alike(ways: tuple[Any, Any], case: int) -> None:
    path, kind, data = CASES[case]
    headers = {} if kind is None else {"content-type": kind}
    quick, slow = (way.post(path, content=data, headers=headers) for way in ways)
    assert plain(quick) == plain(slow)
    assert set(quick.headers) == set(slow.headers)


def test_the_short_way_never_enters_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import routing

    monkeypatch.setattr(routing, "solve_dependencies", None)
    http = client()
    assert http.post(COMPLETIONS, json={"model": "base", "prompt": "x"}).status_code == 200
    assert http.post(CHAT, json={"model": "base", "messages": TURN}).status_code == 200


def test_a_tenant_without_room_is_refused_before_a_byte_of_its_body_is_read(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry, Tenancy.open(registry.database) as tenancy:
        limits = Limits.from_dict({**Limits.none().to_dict(), "requests_per_minute": 0})
        tenancy.tenants.create("acme", limits=limits, actor="test")
        key = tenancy.keys.create("acme", scopes=["infer"], actor="test").secret
        told = config(tenants={"enabled": True})
        app = create_app(told, stub_services(registry=registry, tenancy=tenancy))
        heads: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was asked for")

        async def send(message: Any) -> None:
            heads.append(message)

        scope = {
            "type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": b"", "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("a", 80), "client": ("b", 1),
            "headers": [(b"authorization", b"Bearer " + key.encode()), (b"content-type", b"application/json")],
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
    assert heads[0]["status"] == 429
    assert b"retry-after" in dict(heads[0]["headers"])


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Any, Tenancy, Any]]:
    """(application with room for four requests, its tenancy, a key of the tenant acme)."""
    with Registry.open(tmp_path) as registry, Tenancy.open(registry.database) as tenancy:
        limits = {"max_connections": 8, "read_timeout_s": 3.0}
        told = config(tenants={"enabled": True}, limits=limits)
        app = create_app(told, stub_services(registry=registry, tenancy=tenancy))
        tenancy.tenants.create("acme", actor="test")
        tenancy.tenants.create("bob", actor="test")
        yield app, tenancy, tenancy.keys.create("acme", scopes=["infer"], actor="test")


async def post(app: Any, secret: str, receive: Any, path: str = COMPLETIONS) -> int:
    """The status of a call whose body comes from `receive`."""
    heads: list[Any] = []

    async def send(message: Any) -> None:
        heads.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": b"", "query_string": b"",
        "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("a", 80), "client": ("b", 1),
        "headers": [(b"authorization", b"Bearer " + secret.encode()), (b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, send)
    return int(heads[0]["status"])


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings"])
def test_a_key_that_is_revoked_while_its_body_comes_runs_nothing(
    keyed: tuple[Any, Tenancy, Any], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    app, tenancy, key = keyed
    monkeypatch.setattr("loramux.server.auth.FRESH_S", 0.0)

    body = b'{"model": "base", "prompt": "x", "input": "x"}'
    sent = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        tenancy.keys.revoke(key.key.id, actor="test")
        return next(sent, {"type": "http.disconnect"})

    assert asyncio.run(post(app, key.secret, receive, path)) == 401
    assert app.state.services.engine.served == 0


def test_bodies_that_one_tenant_never_ends_leave_places_for_the_others(
    keyed: tuple[Any, Tenancy, Any],
) -> None:
    app, tenancy, key = keyed
    other = tenancy.keys.create("bob", scopes=["infer"], actor="test")

    async def main() -> list[int]:
        never = asyncio.Event()

        async def silent() -> Any:
            await never.wait()
            return {"type": "http.disconnect"}

        def short() -> Any:
            sent = iter([{"type": "http.request", "body": b'{"model": "base", "prompt": "x"}'}])

            async def receive() -> Any:
                return next(sent, None) or await silent()

            return receive

        held = [asyncio.ensure_future(post(app, key.secret, silent)) for _ in range(3)]
        await asyncio.sleep(0.05)
        found = [await post(app, key.secret, silent), await post(app, other.secret, short())]
        never.set()
        await asyncio.gather(*held)
        never.clear()
        return [*found, await post(app, key.secret, short())]

    assert asyncio.run(main()) == [429, 200, 200]


@pytest.mark.parametrize(
    "value",
    [
        {"b": [1, None, True], "a": {"z": "x", "y": -5}},
        {"text": 'quote " slash \\ / tab \t line \n bell \x07', "seed": 2**62},
        {"del": "\x7f"},
        {"del": "\x7f", "more": "ü \U0001f600 \u2028"},
        {"ü": 1, "z": 2, "\U0001f600": 3},
        {"huge": 2**80},
        {"empty": {}, "list": [], "tuple": (1, 2)},
    ],
)
def test_the_fast_canonical_form_is_the_canonical_form(value: Any) -> None:
    assert canonical_of_ours(value) == canonical_json(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_the_canonical_form_has_no_number_that_json_has_not(number: float) -> None:
    with pytest.raises(FormatError, match="not expressible"):
        canonical_json({"weight": number})


def test_without_the_faster_library_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"id": "x", "text": "ü\n\u2028", "number": 0.5, "none": None, "list": [1, "a"]}
    fast = streams.to_json(said), canonical_of_ours({"a": "ü"})
    monkeypatch.setattr(streams, "orjson", None)
    monkeypatch.setattr(receipts, "orjson", None)
    assert (streams.to_json(said), canonical_of_ours({"a": "ü"})) == fast


def test_tallies_show_what_the_client_librarys_histogram_shows() -> None:
    bounds, values = (0.1, 1.0, 5.0, 10.0), (0.0, 0.1, 0.11, 1, 4.9, 5, 7.5, 10.0, 11, 1000)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies({"wait": ("A text.", bounds)}, "vllm:", ("model", "engine"), ("m", "0"))
    ours.register(tallies)
    known = Histogram("vllm:wait", "A text.", ("model", "engine"), buckets=bounds, registry=theirs)
    tallies["wait"].observe_all(values)
    for value in values:
        known.labels("m", "0").observe(value)
    wanted = [x for x in generate_latest(theirs).decode().splitlines() if "_created" not in x]
    assert generate_latest(ours).decode().splitlines() == wanted
