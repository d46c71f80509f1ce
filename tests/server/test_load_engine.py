"""A real engine behind the real server under load: streams, aliases that move, a flood, quota races. Short forms.

The full ones: `python -m loramux.bench.gateway_streams`, `gateway_flips`, `gateway_flood`; figures:
docs/reliability.md.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux.bench import gateway_flips, gateway_flood, gateway_streams
from loramux.bench.gateway_server import Served, in_thread
from loramux.bench.gateway_world import World, add_tenants, prepare
from loramux.registry import Registry
from loramux.tenancy import Tenancy

SLOW_MACHINE = 5  # times the second that the full check allows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return prepare(
        tmp_path_factory.mktemp("load"), len(gateway_flips.NAMES) * gateway_flips.VERSIONS
    )


@pytest.fixture(scope="module")
def contents(world: World) -> dict[str, int]:
    """Everything published; digest -> content."""
    with Registry.open(world.home / "registry") as registry:
        for content in range(gateway_streams.CONTENTS):
            world.publish(registry, content, f"c{content}")
        return gateway_flips.publish_all(world, registry)


@pytest.fixture(scope="module")
def served(world: World, contents: dict[str, int]) -> Iterator[Served]:
    with in_thread(world.home, gateway_streams.CONFIG) as served:
        yield served


def test_streams_that_are_read_slowly_or_left_give_slots_and_blocks_back(served: Served) -> None:
    found = asyncio.run(
        gateway_streams.run(served, rounds=2, streams=30, tokens=24, free_s=SLOW_MACHINE)
    )
    assert found.problems == []
    assert (found.whole, found.slow, found.left, found.failed) == (42, 6, 12, 0)
    assert served.services.gate.num_inflight == 0


def test_aliases_that_move_under_load_fail_no_call_and_mix_no_answer(
    served: Served, contents: dict[str, int]
) -> None:
    found = asyncio.run(gateway_flips.Flipping(served, contents).run(20, clients=4, pause_s=0.05))
    assert found.problems == [] and found.failed == 0
    assert found.flips == 20 and found.answers >= 20 and 0 < found.streamed < found.answers
    assert found.during_a_flip  # else the moves met no call


def test_the_check_of_flips_sees_an_answer_of_other_weights(served: Served) -> None:
    """What it looks for is there to be found: the same calls judged by contents that are swapped."""
    flipping = gateway_flips.Flipping(served, {})
    with Registry.open(Path(served.services.registry.database.url.database).parent) as registry:
        versions = registry.versions("local/law", None)
        flipping.contents = {v.digest: v.version for v in versions}  # one off
        flipping.led["law"] = [
            gateway_flips.Led(registry.resolve("local/law@live", caller=None).version, 0.0)
        ]
    found = asyncio.run(flipping.ask_once("law"))
    assert found.problems and "says" in found.problems[0]


@pytest.fixture
def with_tenants(world: World, tmp_path: Path) -> Iterator[tuple[Served, Tenancy]]:
    """A server with keys over the same base, and a registry of its own."""
    (tmp_path / "base").symlink_to(world.home / "base")
    with (
        Registry.open(tmp_path / "registry") as registry,
        Tenancy.open(registry.database) as tenancy,
        in_thread(tmp_path, gateway_flood.CONFIG) as served,
    ):
        yield served, tenancy


def test_a_flood_is_refused_beyond_its_concurrency_and_nobody_else_is(
    with_tenants: tuple[Served, Tenancy],
) -> None:
    served, tenancy = with_tenants
    keys = add_tenants(tenancy, gateway_flood.QUIET)
    keys |= add_tenants(tenancy, [gateway_flood.FLOOD], max_concurrency=3)
    load: dict[str, Any] = {"seconds": 1.5, "seed": 0, "prompt_tokens": 64, "answer_tokens": 8}
    asyncio.run(asyncio.sleep(0.6))  # until the server knows the keys
    found = asyncio.run(gateway_flood.half(served, keys, rate=3.0, factor=100.0, **load))
    flood = found.statuses.pop(gateway_flood.FLOOD)
    assert set(flood) == {200, 429} and flood[429] > flood[200] > 0
    assert found.waits and all(set(count) == {200} for count in found.statuses.values())


def test_calls_that_race_for_the_last_of_a_quota_overspend_at_most_one(
    with_tenants: tuple[Served, Tenancy],
) -> None:
    served, tenancy = with_tenants
    done = asyncio.run(gateway_flood.races(served, tenancy, 1))
    assert {each.kind for each in done} == {"requests", "tokens"}
    for each in done:
        assert each.overspent <= 1, each
        assert set(each.statuses) == {200, 429} and each.without_retry_after == 0
        assert each.statuses == Counter(each.statuses) and each.statuses[200] > 0
