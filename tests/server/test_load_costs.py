"""What a call must not pay for: these were most of its cost once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from loramux.bench.gateway import upload
from loramux.bench.gateway_cost import Costs, measure
from loramux.registry import Registry, read
from loramux.server.app import create_app
from loramux.server.loaded import LoadedAdapters
from loramux.server.stub import StubEngine
from loramux.tenancy import Tenancy
from loramux.tenancy.caller import Caller, Limits
from server.rig import config, stub_services


def test_looking_a_version_up_builds_no_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        made = registry.publish(
            upload(tmp_path, "acme/law"), tenant="acme", name="law", actor="test"
        )
        monkeypatch.setattr(read, "select", None)
        monkeypatch.setattr(read, "_live", None)
        for wanted in ("law", "law@1", f"law@sha256:{made.digest}"):
            assert registry.resolve(wanted, caller="acme") == made
            assert registry.resolve(f"acme/{wanted}", caller=None) == made


def test_taking_adapters_back_looks_at_no_more_than_it_takes() -> None:
    looks = 0

    class Version:
        def __init__(self, digest: str):
            self.digest = digest

    async def main() -> None:
        nonlocal looks
        loaded = LoadedAdapters(StubEngine(), lambda version: "folder", limit=500)

        async def use(digest: str) -> None:
            async with loaded.pinned([Version(digest)]):
                pass

        for number in range(500):
            await use(f"d{number}")

        class Counted(asyncio.Future[Any]):
            def done(self) -> bool:
                nonlocal looks
                looks += 1
                return super().done()

        for entry in loaded._entries.values():
            entry.ready = Counted()
            entry.ready.set_result(None)
        looks = 0
        await use("one more")
        assert len(loaded) == 500 and "d0" not in loaded

    asyncio.run(main())
    assert looks < 10


def test_the_ledger_of_many_tenants_is_written_by_one_statement(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry, Tenancy.open(registry.database) as tenancy:
        for number in range(300):
            caller = Caller(f"t{number}", "k", frozenset(), limits=Limits.none())
            tenancy.quotas.reserve(caller, 5).settle(3)
        said: list[str] = []
        event.listen(
            registry.database, "before_cursor_execute", lambda *given: said.append(given[2])
        )
        tenancy.flush()
        assert len([text for text in said if "tenant_usage" in text]) == 1
        assert tenancy.ledger("t299").tokens == 3


def test_costs_of_calls_are_measured_in_every_way_a_call_can_go(tmp_path: Path) -> None:
    costs = Costs(tmp_path)
    found = asyncio.run(measure(costs, rounds=1, calls=3))
    costs.close()
    assert set(found) == {"new", "known", "refused", "chunk"}
    assert found["refused"] < found["new"]


def test_more_calls_than_can_be_are_refused_before_they_are_read_and_say_when_to_come_again() -> (
    None
):
    services = stub_services()
    app = create_app(config(limits={"max_connections": 4}), services)
    statuses: list[int] = []
    told: list[bytes | None] = []

    async def call(path: str, hold: asyncio.Event) -> None:
        async def receive() -> Any:
            await hold.wait()  # a body that does not come yet
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                told.append(dict(message["headers"]).get(b"retry-after"))

        scope = {
            "type": "http", "method": "GET" if path == "/health" else "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await app(scope, receive, send)

    async def main() -> None:
        hold = asyncio.Event()
        held = [asyncio.ensure_future(call("/v1/completions", hold)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await call("/v1/completions", hold)
        await call("/health", hold)
        assert (statuses, told) == ([503, 200], [b"1", None])
        hold.set()
        await asyncio.gather(*held, return_exceptions=True)
        statuses.clear()
        await call("/v1/completions", hold)
        assert statuses != [503]  # places are given back

    asyncio.run(main())
