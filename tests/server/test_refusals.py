"""Refusals made before a route is looked up: each is counted like any other answer, and 429 goes before 503."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux.registry import Registry
from loramux.server.app import create_app
from loramux.server.errors import ApiError
from loramux.server.limits import Gate
from loramux.server.metrics import KEY
from loramux.tenancy import Tenancy
from loramux.tenancy.caller import Caller, Limits
from server.rig import client, config, error_of, stub_services

COMPLETIONS = "/v1/completions"
BODY = {"model": "base", "prompt": "x", "max_tokens": 2}


def counts(services: Any) -> dict[tuple[str, str, str], float]:
    """{(method, route, status): how many}."""
    return {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"]): sample.value
        for family in services.extras[KEY].registry.collect()
        for sample in family.samples
        if sample.name == "loramux_http_responses_total"
    }


class World:
    """A server with keys and room for two calls, one of each tenant at most; calls whose bodies never come."""

    def __init__(self, home: Path) -> None:
        self.registry = Registry.open(home)
        self.tenancy = Tenancy.open(self.registry.database)
        self.services = stub_services(registry=self.registry, tenancy=self.tenancy)
        told = config(tenants={"enabled": True}, limits={"max_connections": 4})
        self.app = create_app(told, self.services)
        none = Limits.from_dict({**Limits.none().to_dict(), "requests_per_minute": 0})
        self.keys = {}
        for name, limits in (("acme", None), ("bob", None), ("carol", None), ("poor", none)):
            self.tenancy.tenants.create(
                name, **({"limits": limits} if limits else {}), actor="test"
            )
            made = self.tenancy.keys.create(name, scopes=["infer"], actor="test")
            self.keys[name] = made.secret
        self.never = asyncio.Event()

    async def call(
        self, who: str | None, path: str = COMPLETIONS
    ) -> tuple[int, dict[bytes, bytes]]:
        """(status, headers) of a call that says nothing after its head."""
        heads: list[Any] = []

        async def receive() -> Any:
            await self.never.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            heads.append(message)

        key = self.keys.get(str(who), who)
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": b"", "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("a", 80),
            "client": ("b", 1), "headers": [(b"authorization", f"Bearer {key}".encode())] if who else [],
        }  # fmt: skip
        await self.app(scope, receive, send)
        return int(heads[0]["status"]), dict(heads[0]["headers"])

    def refused(
        self, held: list[str], asked: list[str | None], path: str = COMPLETIONS
    ) -> list[int]:
        """The statuses of calls while others hold their places with bodies that never end."""

        async def run() -> list[int]:
            self.never = asyncio.Event()
            tasks = [asyncio.ensure_future(self.call(who)) for who in held]
            await asyncio.sleep(0)
            found = [await self.call(who, path) for who in asked]
            self.never.set()
            await asyncio.gather(*tasks)
            assert all(b"retry-after" in headers for _, headers in found)
            return [status for status, _ in found]

        return asyncio.run(run())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.tenancy.close()
        made.registry.close()


# --- 429 or 503 -------------------------------------------------------------------------------------


def test_while_all_places_are_taken_who_holds_a_full_share_is_told_so_and_others_that_it_is_full(
    world: World,
) -> None:
    assert world.refused(["acme", "bob"], ["acme", "bob", "carol"]) == [429, 429, 503]


def test_while_all_places_are_taken_who_is_over_its_quota_is_told_so(world: World) -> None:
    assert world.refused(["acme", "bob"], ["poor", "carol"]) == [429, 503]
    # Quotas of inference say nothing of other routes.
    assert world.refused(["acme", "bob"], ["poor"], "/v1/embeddings") == [503]


def test_while_all_places_are_taken_nobody_learns_whether_a_key_is_valid(world: World) -> None:
    assert world.refused(["acme", "bob"], [None, "lmx_wrong"]) == [503, 503]


def queue_of(services: Any, places: int, *tenants: str) -> ExitStack:
    """Until it is closed, each of these holds a place of a queue in which a tenant may have two."""
    services.gate, held = Gate(places, 2), ExitStack()
    for tenant in tenants:
        held.enter_context(services.gate.enter(tenant))
    return held


def test_a_full_queue_is_the_last_reason_that_a_call_is_told() -> None:
    services = stub_services()

    class Quotas:
        def check_room(self, caller: Any) -> None:
            if caller.tenant == "poor":
                raise ApiError("you have used up your minute", code="rate_limit_exceeded")

    services.tenancy = type("Books", (), {"quotas": Quotas()})()
    expected = {"acme": "too_many_requests", "poor": "rate_limit_exceeded", "bob": "overloaded"}
    with queue_of(services, 3, "acme", "acme", "bob"):
        for tenant, code in expected.items():
            with pytest.raises(ApiError) as caught:
                services.check_room(replace(Caller.local(), tenant=tenant))
            assert caught.value.code == code
            assert caught.value.status == (503 if tenant == "bob" else 429)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings"])
def test_while_all_places_are_taken_who_fills_its_share_of_the_queue_is_told_so(
    world: World, path: str
) -> None:
    with queue_of(world.services, 8, "carol", "carol"):
        assert world.refused(["acme", "bob"], ["carol"], path) == [429]


def test_of_a_full_queue_its_own_share_is_the_first_that_a_tenant_is_told() -> None:
    services = stub_services()
    with queue_of(services, 2, "acme", "acme"):
        for tenant, status in (("acme", 429), ("bob", 503)):
            with pytest.raises(ApiError) as caught, services.gate.enter(tenant):
                raise AssertionError("it was let in")
            assert caught.value.status == status


def test_a_call_whose_place_went_while_its_body_came_is_told_the_same_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = queue_of(world.services, 1, "bob")
    asked: list[str] = []
    quotas = world.tenancy.quotas
    monkeypatch.setattr(quotas, "hold", lambda caller: asked.append("hold"))
    monkeypatch.setattr(world.services, "check_room", _second_time(world.services.check_room))

    async def run() -> int:
        sent = iter([{"type": "http.request", "body": b'{"model": "base", "prompt": "x"}'}])
        heads: list[Any] = []

        async def receive() -> Any:
            return next(sent, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            heads.append(message)

        scope = {
            "type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": b"", "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("a", 80), "client": ("b", 1),
            "headers": [
                (b"authorization", f"Bearer {world.keys['poor']}".encode()),
                (b"content-type", b"application/json"),
            ],
        }  # fmt: skip
        await world.app(scope, receive, send)
        return int(heads[0]["status"])

    with held:
        assert asyncio.run(run()) == 429 and not asked


def _second_time(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """There was room before the body came."""
    calls: list[Any] = []

    def checked(caller: Any) -> None:
        calls.append(caller)
        if len(calls) > 1:
            check(caller)

    return checked


# --- Counted ----------------------------------------------------------------------------------------


def test_refusals_of_the_outermost_layer_are_counted_under_their_route(world: World) -> None:
    assert world.refused(["acme", "bob"], ["acme", "carol", None]) == [429, 503, 503]
    found = counts(world.services)
    assert found["POST", COMPLETIONS, "429"] == 1 and found["POST", COMPLETIONS, "503"] == 2

    async def stranger() -> int:
        return (await world.call("lmx_wrong", "/v1/adapters/secret-name"))[0]

    assert asyncio.run(stranger()) == 401
    assert counts(world.services)["POST", "unmatched", "401"] == 1


def test_bodies_too_large_and_strange_hosts_are_counted_too_and_every_answer_once() -> None:
    services = stub_services()
    http = client(services, limits={"body_bytes": 1024})
    assert http.post(COMPLETIONS, json=BODY).status_code == 200
    error_of(http.post(COMPLETIONS, content=b"x" * 2000), 413)
    error_of(http.post(COMPLETIONS, json=BODY, headers={"host": "evil.example"}), 403)
    for method, path in (("BREW", COMPLETIONS), ("GET", "/v1/adapters/x/../y")):
        error_of(http.request(method, path, headers={"host": "evil.example"}), 403)
    assert counts(services) == {
        ("POST", COMPLETIONS, "200"): 1,
        ("POST", COMPLETIONS, "413"): 1,
        ("POST", COMPLETIONS, "403"): 1,
        ("other", COMPLETIONS, "403"): 1,
        ("GET", "unmatched", "403"): 1,
    }
