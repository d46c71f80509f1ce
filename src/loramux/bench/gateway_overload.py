"""Ten times what the server can do: the rest is told to come again, and soon after it is as before.

    python -m loramux.bench.gateway_overload --factor 10 --seconds 10

Capacity is measured first, with as many clients as there are places. Then calls come at `factor` times that rate,
whatever the answers do. Each is answered, or refused with 429 or 503 and Retry-After. Afterwards one call at a time is
sent until one is answered as fast as before the flood (twice the slowest of then), which must be within `RECOVERY_S`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.bench.gateway_http import Reply, ask, get, quantile
from loramux.bench.gateway_server import Served, in_process
from loramux.bench.gateway_world import prepare

RECOVERY_S = 5.0
PLACES = 16
CONFIG = {
    "engine": {"kv_memory": "16MiB", "threads": 1},
    "limits": {"max_inflight": PLACES, "max_inflight_per_tenant": PLACES},
}
STUB_S = 0.05  # a token of the stub: four make an answer


@dataclass
class Overload:
    """Counts by status; times in seconds."""

    capacity_per_s: float = 0.0
    sent: int = 0
    took_s: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    without_retry_after: int = 0
    p99_refusal_s: float = 0.0
    recovery_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            **vars(self),
            "statuses": dict(self.statuses),
            "sent_per_s": round(self.sent / self.took_s, 1),
            "answered_per_s": round(self.statuses[200] / self.took_s, 1),
            "load_average": round(os.getloadavg()[0], 1),
        }


async def run(
    served: Served, factor: float, seconds: float, tokens: int, places: int = PLACES
) -> Overload:
    port, found = served.port, Overload()
    body = {"model": "base", "prompt": "w1 w2 w3", "max_tokens": tokens, "temperature": 0}

    async def timed() -> tuple[Reply, float]:
        began = time.perf_counter()
        return await ask(port, body), time.perf_counter() - began

    usual = max([(await timed())[1] for _ in range(5)])
    found.capacity_per_s = round(await _capacity(port, body, min(2.0, seconds), places), 1)
    refusals: list[float] = []

    async def one() -> None:
        try:
            reply, took = await timed()
        except (OSError, asyncio.IncompleteReadError) as error:
            found.problems.append(f"a connection ended: {type(error).__name__}")
            return
        found.statuses[reply.status] += 1
        if reply.status in (429, 503):
            refusals.append(took)
            found.without_retry_after += "retry-after" not in reply.headers

    start = time.perf_counter()
    rate = factor * found.capacity_per_s
    found.sent = int(rate * seconds)
    calls = []
    for place in range(found.sent):
        await asyncio.sleep(max(0.0, start + place / rate - time.perf_counter()))
        calls.append(asyncio.ensure_future(one()))
    found.took_s = round(time.perf_counter() - start, 2)
    over = time.perf_counter()
    await _recovered(port, timed, 2 * usual)
    found.recovery_s = round(time.perf_counter() - over, 3)
    await asyncio.gather(*calls)
    found.p99_refusal_s = round(quantile(refusals or [0.0], 0.99), 3)
    _judge(found)
    return found


def _judge(found: Overload) -> None:
    others = set(found.statuses) - {200, 429, 503}
    if others:
        found.problems.append(f"answers with {sorted(others)}")
    if found.without_retry_after:
        found.problems.append(f"{found.without_retry_after} refusals without Retry-After")
    if found.recovery_s > RECOVERY_S:
        found.problems.append(f"slow for {found.recovery_s} s after the flood")
    if not (found.statuses[429] or found.statuses[503]) or not found.statuses[200]:
        found.problems.append("nothing was refused, or nothing answered: no overload")
    del found.problems[20:]


async def _capacity(port: int, body: Any, seconds: float, places: int) -> float:
    """Answers a second with every place taken."""
    until, count = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal count
        while time.perf_counter() < until:
            reply = await ask(port, body)
            count += reply.status == 200  # not in one line: the sum is read before the wait

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(places)))
    return count / (time.perf_counter() - began)


async def _recovered(port: int, timed: Any, usual_s: float) -> None:
    until = time.perf_counter() + 4 * RECOVERY_S
    while time.perf_counter() < until:
        reply, took = await timed()
        if reply.status == 200 and took <= usual_s and (await get(port, "/ready")).status == 200:
            return
        await asyncio.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--engine", choices=("real", "stub"), default="real")
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    stub = STUB_S if given.engine == "stub" else None
    with tempfile.TemporaryDirectory(prefix="loramux-overload-") as folder:
        prepare(Path(folder), 2)
        with in_process(Path(folder), CONFIG, stub) as served:
            found = asyncio.run(run(served, given.factor, given.seconds, given.tokens))
    sys.stdout.write(json.dumps(found.summary()) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
