"""What a call must not pay for: these were most of its cost once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loramux.bench.gateway import upload
from loramux.registry import Registry, read
from loramux.server.loaded import LoadedAdapters
from loramux.server.stub import StubEngine


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
