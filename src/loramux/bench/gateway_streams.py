"""Many streams at a time, some read slowly, some left: memory stays, slots and blocks are free again within a second.

    python -m loramux.bench.gateway_streams --streams 200 --rounds 20

A real engine behind the real server, on a tiny base. Per round every tenth stream is read slowly through a small
receive buffer, every fifth is left after a few chunks, the others are read to their end. When the last client is done
the engine's books must be empty within `FREE_S`: nothing runs or waits, no slot is pinned, every block is free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.bench.gateway_http import get, open_call
from loramux.bench.gateway_server import Served, in_process
from loramux.bench.gateway_world import prepare

FREE_S = 1.0
WAIT_S = 10.0
SLOW_S = 0.02  # a slow reader's pause before each chunk
CONTENTS = 8
# A pool of blocks that the first rounds use up: its pages count as resident from when they are first written.
CONFIG = {
    "metrics": {"public": True},
    "engine": {"kv_memory": "8MiB", "max_batch": 64, "threads": 1},
    "limits": {"max_inflight": 512, "max_inflight_per_tenant": 512},
}
BOOKS = (  # gauges that are 0 when nobody is served
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "loramux_adapter_slots_pinned",
    "loramux_adapter_pins",
)


@dataclass
class Streams:
    """What happened; times in seconds, memory in bytes."""

    rounds: int = 0
    whole: int = 0
    slow: int = 0
    left: int = 0
    failed: int = 0
    free_after_s: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The first fifth of the rounds warms caches up and says nothing about growth."""
        settled = self.resident[len(self.resident) // 5 :]
        half = len(settled) // 2
        before, after = max(settled[:half] or settled), max(settled[half:])
        return {
            **{k: v for k, v in vars(self).items() if k not in ("free_after_s", "resident")},
            "free_after_s_max": round(max(self.free_after_s), 3),
            "resident_mb": [round(value / 2**20, 1) for value in self.resident],
            "growth_mb": round((after - before) / 2**20, 1),  # of the second half over the first
        }


async def one_round(
    served: Served, found: Streams, streams: int, tokens: int, free_s: float
) -> None:
    """All streams at once, then the wait for empty books."""
    done = await asyncio.gather(*(_one(served.port, i, tokens, found) for i in range(streams)))
    over = time.perf_counter()
    while books := await _held(served.port):
        if time.perf_counter() - over > WAIT_S:
            found.problems.append(f"still held after {WAIT_S:g} s: {books}")
            break
        await asyncio.sleep(0.01)
    found.free_after_s.append(time.perf_counter() - over)
    if found.free_after_s[-1] > free_s:
        found.problems.append(f"held for {found.free_after_s[-1]:.2f} s")
    found.failed += done.count(False)
    found.rounds += 1
    found.resident.append(served.resident_bytes)


async def _one(port: int, place: int, tokens: int, found: Streams) -> bool:
    """Whether it went as it should."""
    is_slow, is_leaving = place % 10 == 1, place % 5 == 2
    body = {
        "model": f"c{place % CONTENTS}", "prompt": f"w{place % 64} w{place % 7} w3", "temperature": 0,
        "max_tokens": tokens, "stream": True,
    }  # fmt: skip
    seen, end = 0, None
    async with open_call(port, body, receive_bytes=4096 if is_slow else None) as answer:
        if answer.status != 200:
            found.problems.append(f"a stream gave {answer.status}: {(await answer.body())[:200]!r}")
            return False
        async for event in answer.events():
            seen += 1
            if is_leaving and seen == 2 + place % 9:
                found.left += 1
                return True
            if is_slow:
                await asyncio.sleep(SLOW_S)
            end = event["choices"][0]["finish_reason"] if event.get("choices") else end
    found.slow += is_slow
    found.whole += not is_slow
    if end != "length":
        found.problems.append(f"a stream ended with {end!r} after {seen} chunks")
    return end == "length"


async def _held(port: int) -> dict[str, float]:
    """The books that are not empty."""
    page = (await get(port, "/metrics")).body.decode()
    if "loramux_engine_up 1.0" not in page:
        return {"loramux_engine_up": 0.0}
    rows = (line.rsplit(" ", 1) for line in page.splitlines() if line.startswith(BOOKS))
    return {name: float(value) for name, value in rows if float(value)}


async def run(
    served: Served, rounds: int, streams: int, tokens: int, free_s: float = FREE_S
) -> Streams:
    found = Streams()
    for _ in range(rounds):
        await one_round(served, found, streams, tokens, free_s)
    return found


def prepared(home: Path) -> None:
    """Adapters c0, c1, ... in a registry."""
    from loramux.registry import Registry

    world = prepare(home, CONTENTS)
    with Registry.open(home / "registry") as registry:
        for content in range(CONTENTS):
            world.publish(registry, content, f"c{content}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-streams-") as folder:
        prepared(Path(folder))
        with in_process(Path(folder), CONFIG) as served:
            found = asyncio.run(run(served, given.rounds, given.streams, given.tokens))
    sys.stdout.write(json.dumps(found.summary()) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
