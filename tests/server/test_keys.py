"""Keys and quotas through the server: who gets in, what a call is charged, and that every way of ending settles it."""

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from loramux.registry.db import open_database
from loramux.server.app import create_app
from loramux.server.stub import StubRegistry
from loramux.tenancy import Tenancy
from loramux.tenancy.caller import Limits
from server.rig import config, error_of, stub_services

ALL = ("infer", "adapters:read", "adapters:write", "admin")


@pytest.fixture
def made(tmp_path: Any) -> Iterator[Any]:
    """A server with tenants a (10 requests, 500 tokens, 2 at a time) and b, and an adapter of each."""
    database = open_database(f"sqlite:///{tmp_path / 'tenants.sqlite3'}")
    tenancy = Tenancy.open(database, poll_s=0.0)
    limits = Limits(requests_per_minute=10, tokens_per_minute=500, max_concurrency=2)
    tenancy.tenants.create("a", limits=limits, actor="test")
    tenancy.tenants.create("b", weight=3.0, actor="test")
    keys = {name: tenancy.keys.create(name, ALL, actor="test") for name in ("a", "b")}
    reader = tenancy.keys.create("a", ["adapters:read"], actor="test")
    registry = StubRegistry()
    registry.add("a", "law")
    registry.add("b", "law")
    services = stub_services(registry=registry, tenancy=tenancy)
    told: dict[str, float] = {}
    services.engine.set_tenant_weight = told.__setitem__  # type: ignore[attr-defined]
    app = create_app(config(tenants={"enabled": True}), services)
    http = TestClient(app, base_url="http://gateway.example")
    yield SimpleNamespace(
        http=http, app=app, services=services, tenancy=tenancy, keys=keys, reader=reader, told=told
    )
    http.close()
    database.dispose()


def ask(made: Any, key: Any, **fields: Any) -> Any:
    secret = getattr(key, "secret", key)
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    body = {"model": "law", "prompt": "abc", "max_tokens": 8, **fields}
    return made.http.post("/v1/completions", json=body, headers=headers)


def used(made: Any, tenant: str) -> tuple[int, int]:
    found = made.tenancy.quotas.usage(tenant)
    return found.requests, found.tokens


def test_without_a_key_a_wrong_one_or_one_without_the_scope_nobody_is_served(made):
    for key in (None, "", "wrong", "loramux_" + "x" * 50):
        response = ask(made, key)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(ask(made, made.reader), 403)["code"] == "permission_denied"
    assert made.http.get("/health").status_code == 200
    assert made.services.engine.served == 0


def test_a_name_means_the_callers_own_adapter_and_foreign_names_are_missing(made):
    for name in ("a", "b"):
        assert ask(made, made.keys[name]).json()["model"] == f"{name}/law@1"
    foreign, missing = (
        ask(made, made.keys["a"], model="b/law"),
        ask(made, made.keys["a"], model="b/wal"),
    )
    assert error_of(foreign, 404)["code"] == "model_not_found"
    assert foreign.text.replace("b/law", "X") == missing.text.replace("b/wal", "X")


def test_a_revoked_key_is_refused_at_once(made):
    assert ask(made, made.keys["b"]).status_code == 200
    made.tenancy.keys.revoke(made.keys["b"].key.id, actor="test")
    assert error_of(ask(made, made.keys["b"]), 401)["code"] == "invalid_api_key"


def test_an_answer_is_charged_for_its_tokens_and_a_refused_call_for_none(made):
    response = ask(made, made.keys["a"])
    assert used(made, "a") == (1, 3 + 8)
    assert response.headers["x-ratelimit-limit-tokens"] == "500"
    ask(made, made.keys["a"], model="nobody")
    ask(made, made.keys["a"], max_tokens=-1)
    assert used(made, "a") == (1, 11)
    assert made.told == {}
    ask(made, made.keys["b"])
    assert made.told == {"b": 3.0}


def test_more_than_the_quota_is_429_with_retry_after(made):
    for _ in range(10):
        assert ask(made, made.keys["a"]).status_code == 200
    response = ask(made, made.keys["a"])
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert int(response.headers["retry-after"]) >= 1
    assert ask(made, made.keys["b"]).status_code == 200
    assert used(made, "a") == (10, 110)


def test_a_failed_answer_is_charged_for_what_it_used(made):
    made.services.engine.fail = "broken"
    assert ask(made, made.keys["a"]).status_code == 500
    assert used(made, "a") == (1, 11)
    made.services.engine.fail = "broken"
    assert ask(made, made.keys["a"], stream=True).status_code == 200
    assert used(made, "a") == (2, 22)


def test_a_stream_whose_reader_leaves_is_charged_for_what_it_was_given_and_frees_its_place(made):
    made.services.engine.delay_s = 0.01
    sent: list[Any] = []

    async def main() -> None:
        body = json.dumps(
            {"model": "law", "prompt": "abc", "max_tokens": 8, "n": 3, "stream": True}
        )
        first = [{"type": "http.request", "body": body.encode(), "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "client": ("127.0.0.1", 1),
            "server": ("x", 80),
            "asgi": {"version": "3.0"},
            "headers": [
                (b"content-type", b"application/json"),
                (b"authorization", f"Bearer {made.keys['a'].secret}".encode()),
            ],
        }
        task = asyncio.ensure_future(made.app(scope, receive, send))
        while len(sent) < 4:
            await asyncio.sleep(0.005)
        made.services.engine.delay_s = 300.0  # of every token from here on: nothing ends by itself
        gone.set()
        await asyncio.wait_for(task, 1)

    asyncio.run(main())
    requests, tokens = used(made, "a")
    assert requests == 1 and 3 + 3 <= tokens < 3 + 24
    made.tenancy.quotas.check_integrity()
    assert made.services.gate.num_inflight == made.services.engine.running == 0


def test_no_more_than_the_tenants_own_share_runs_at_once(made):
    made.services.engine.delay_s = 0.01

    async def main() -> list[int]:
        transport = httpx.ASGITransport(made.app)
        headers = {"authorization": f"Bearer {made.keys['a'].secret}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", headers=headers
        ) as http:
            body = {"model": "law", "prompt": "abc", "max_tokens": 8}
            done = await asyncio.gather(
                *(http.post("/v1/completions", json=body) for _ in range(5))
            )
        return sorted(response.status_code for response in done)

    assert asyncio.run(main()) == [200, 200, 429, 429, 429]


def test_secrets_and_prompts_are_in_no_log(made, caplog):
    caplog.set_level(0)
    secret = made.keys["a"].secret
    ask(made, made.keys["a"], prompt="kanarienvogel")
    ask(made, secret[:-1] + "0", prompt="kanarienvogel")
    ask(made, made.keys["a"], prompt="kanarienvogel", temperature="kanarienvogel")
    made.services.engine.fail = "broken"
    ask(made, made.keys["a"], prompt="kanarienvogel")
    assert "kanarienvogel" not in caplog.text and secret not in caplog.text
