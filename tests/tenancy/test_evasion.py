"""What tenants may try at the server: to pay nothing, to read secrets from logs, to be let in without a key."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import httpx
import pytest

from loramux.server.app import create_app
from loramux.server.stub import StubRegistry
from loramux.tenancy import Limits, Tenancy
from server.rig import config, stub_services

ALL = ("infer", "adapters:read", "adapters:write", "admin")


@pytest.fixture
def tenant(tenancy: Tenancy) -> Any:
    limits = Limits(requests_per_minute=None, tokens_per_minute=1000, max_concurrency=None)
    tenancy.tenants.create("acme", limits=limits, actor="test")
    return tenancy.keys.create("acme", ALL, actor="test")


@pytest.fixture
def services(tenancy: Tenancy) -> Any:
    registry = StubRegistry()
    registry.add("acme", "mine")
    return stub_services(tenancy=tenancy, registry=registry)


def client(services: Any, key: Any = None) -> httpx.AsyncClient:
    app = create_app(config(tenants={"enabled": True}), services)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {} if key is None else {"Authorization": f"Bearer {key.secret}"}
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "mine", "prompt": "x" * 100, "max_tokens": 8, **fields}


def test_a_request_given_up_before_its_first_token_pays_for_its_prompt(services, tenancy, tenant):
    services.engine.delay_s = 0.2

    async def give_up() -> None:
        async with client(services, tenant) as http:
            task = asyncio.create_task(http.post("/v1/completions", json=completion()))
            while not services.engine.running:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(give_up())
    assert tenancy.quotas.usage("acme").tokens == 100
    tenancy.quotas.check_integrity()


def test_parallel_requests_never_get_more_than_the_minute_has(services, tenancy, tenant):
    """Forty at once, each of 108 tokens at most, from a limit of 1000."""

    async def flood() -> list[int]:
        async with client(services, tenant) as http:
            asked = (http.post("/v1/completions", json=completion()) for _ in range(40))
            return [response.status_code for response in await asyncio.gather(*asked)]

    codes = asyncio.run(flood())
    assert set(codes) == {200, 429}
    used = tenancy.quotas.usage("acme")
    assert used.requests == codes.count(200)
    assert used.tokens <= 1000 < used.tokens + 2 * 108
    tenancy.close()
    assert tenancy.ledger("acme") == used


def test_a_refusal_says_when_to_come_back(services, tenant):
    async def spend() -> httpx.Response:
        async with client(services, tenant) as http:
            while (response := await http.post("/v1/completions", json=completion())).is_success:
                assert "x-ratelimit-remaining-tokens" in response.headers
            return response

    response = asyncio.run(spend())
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 61
    assert response.headers["x-ratelimit-limit-tokens"] == "1000"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


ODD = [
    ("POST", "/v1/completions", b"{not json"),
    ("POST", "/v1/completions", b'{"model": 1}'),
    ("POST", "/v1/chat/completions", b""),
    ("POST", "/v1/adapters", b"no form"),
    ("PUT", "/v1/adapters/mine/aliases/x", b"[]"),
    ("GET", "/v1/models/" + "a/" * 50, b""),
    ("POST", "/v1/load_lora_adapter", b"null"),
]


@pytest.mark.parametrize(("method", "path", "body"), ODD, ids=lambda part: str(part)[:30])
def test_without_a_key_nothing_is_learnt_about_the_request_either(
    services, tenant, method, path, body
):
    async def ask() -> httpx.Response:
        async with client(services) as http:
            headers = {"Content-Type": "application/json"}
            return await http.request(method, path, content=body, headers=headers)

    response = asyncio.run(ask())
    assert response.status_code == 401, response.text


@pytest.mark.parametrize("path", ["/v1/nothing", "/docs", "/redoc", "/admin", "//health"])
def test_a_path_that_is_no_route_is_for_nobody(services, tenant, path):
    async def ask() -> int:
        async with client(services, tenant) as http:
            return (await http.get(path)).status_code

    assert asyncio.run(ask()) == 404


SCHEMES = ["Bearer", "bearer", "BEARER"]


def test_the_key_is_read_from_the_authorization_header_alone(services, tenant):
    async def ask(**given: Any) -> int:
        async with client(services) as http:
            return (await http.get("/v1/models", **given)).status_code

    secret = tenant.secret
    for scheme in SCHEMES:
        assert asyncio.run(ask(headers={"Authorization": f"{scheme} {secret}"})) == 200
    for given in (
        {"headers": {"Authorization": secret}},
        {"headers": {"Authorization": f"Basic {secret}"}},
        {"headers": {"X-Api-Key": secret}},
        {"headers": {"Cookie": f"key={secret}"}},
        {"params": {"api_key": secret}},
        {"headers": [("Authorization", "Bearer x"), ("Authorization", f"Bearer {secret}")]},
    ):
        assert asyncio.run(ask(**given)) == 401


def test_a_thousand_canaries_are_found_in_no_log_metric_or_audit_entry(
    services, tenancy, tenant, caplog
):
    """Prompts, wrong keys and the right one, in requests that are answered, refused, broken and given up."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):  # the client of this test, not the server
        logging.getLogger(name).setLevel(logging.WARNING)
    canaries: list[str] = []

    def canary() -> str:
        canaries.append(f"canary{len(canaries):05d}yranac")
        return canaries[-1]

    async def sing() -> str:
        async with client(services, tenant) as http:
            for i in range(200):
                chat = [{"role": "user", "content": canary()}]
                await http.post(
                    "/v1/chat/completions",
                    json={"model": "mine", "messages": chat, "max_tokens": i % 2},
                )
                await http.post("/v1/completions", json=completion(prompt=canary(), temperature=-i))
                await http.post("/v1/completions", json=completion(prompt=canary(), model="nobody"))
                await http.get("/v1/models", headers={"Authorization": f"Bearer {canary()}"})
                services.engine.fail = "broken" if i % 10 == 0 else None
                await http.post("/v1/completions", json=completion(prompt=canary(), max_tokens=1))
            return (await http.get("/metrics")).text

    metrics = asyncio.run(sing())
    assert len(canaries) == 1000
    audit = "\n".join(tenancy.audit.export())
    for text in (caplog.text, metrics, audit):
        assert "canary" not in text
        assert tenant.secret not in text
        assert tenant.secret.rsplit("_", 1)[1] not in text


def test_a_key_revoked_elsewhere_is_refused_within_a_second_by_a_server_that_is_busy(
    services, engine, tenant, second
):
    """With the real clock, over a server that answers all the time."""
    import time

    other = second()
    services.tenancy = Tenancy.open(engine)
    revoked_at: list[float] = []

    def revoke() -> None:
        other.keys.revoke(tenant.key.id, actor="test")
        revoked_at.append(time.monotonic())

    async def ask() -> float:
        async with client(services, tenant) as http:
            assert (await http.get("/v1/models")).status_code == 200
            thread = threading.Thread(target=revoke)
            thread.start()
            last = until = time.monotonic() + 60
            while True:
                began = (
                    time.monotonic()
                )  # what is asked a second later is refused, however long that takes
                if (await http.get("/v1/models")).status_code != 200:
                    break
                last = began
                assert last < until
            thread.join()
            return last - revoked_at[0]

    assert asyncio.run(ask()) < 1.0
