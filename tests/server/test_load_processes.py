"""Servers in processes of their own: overload, revocation from elsewhere, SIGKILL amid uploads, many adapters. Short.

The full ones: `python -m loramux.bench.gateway`, `gateway_overload`, `gateway_revoke`, `gateway_kill`; figures in
docs/reliability.md.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loramux.bench import gateway, gateway_kill, gateway_overload, gateway_revoke
from loramux.bench.gateway_server import in_process, in_thread
from loramux.bench.gateway_world import World, prepare
from loramux.registry import Registry
from loramux.tenancy import Tenancy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return prepare(tmp_path_factory.mktemp("load"), gateway_kill.CONTENTS)


def test_ten_times_too_much_is_refused_with_retry_after_and_over_at_once(tmp_path: Path) -> None:
    config = {"base": "stub", "limits": {"max_inflight": 4, "max_inflight_per_tenant": 4}}
    with in_thread(tmp_path, config, stub=0.05) as served:
        found = asyncio.run(gateway_overload.run(served, 10, 1.5, tokens=4, places=4))
    assert found.problems == []
    assert found.recovery_s < gateway_overload.RECOVERY_S
    assert sum(found.statuses.values()) == found.sent


def test_a_key_revoked_by_another_process_is_refused_within_a_second(tmp_path: Path) -> None:
    with (
        Registry.open(tmp_path / "registry") as registry,
        Tenancy.open(registry.database) as tenancy,
        in_process(tmp_path, gateway_revoke.CONFIG, stub=0.0) as served,
    ):
        found = asyncio.run(gateway_revoke.run(served, tenancy, 2))
    assert found.problems == [] and len(found.took_s) == 2
    assert max(found.took_s) <= gateway_revoke.WITHIN_S
    assert found.calls > 0 and found.others > 0


def test_a_server_killed_amid_uploads_leaves_a_whole_registry_and_starts_again(
    world: World,
) -> None:
    found = gateway_kill.Killing(world, seed=1).run(2)
    assert found.problems == []
    assert (found.kills, len(found.starts_s)) == (2, 2)
    assert found.acknowledged >= 3  # one after each start


def test_calls_of_many_tenants_to_many_adapters_are_all_answered(tmp_path: Path) -> None:
    found = gateway.measure(tmp_path, rate=40.0, seconds=2.0, seed=0, tenants=10, each=3)
    assert found["requests"] == 80 and found["failed"] == 0
    assert found["adapters"] == 30
