"""A tenant that floods, and tenants that race for the last of a quota, through HTTP.

    python -m loramux.bench.gateway_flood --seconds 60 --rounds 3
    python -m loramux.bench.gateway_flood --defaults --base smollm2-135m --rate 0.1 --seconds 120 --rounds 1
    python -m loramux.bench.gateway_flood --races 20

*Flood*: three quiet tenants send streams at random times, alone at first, then beside one that sends `factor` times as
much as each of them. Measured at the client, from when a call was due: the 95th percentile of the time to the first
token. Every tenant has the same concurrency limit, below the engine's batch; what exceeds it is refused with
429. Steps are small, unless `--defaults` leaves them as the server has them. Beside it, for machines that others use
too: the processor time that the server's process used meanwhile.
*Races*: many calls at once meet a limit that lets some of them through; counted is what got through beyond it.
`loramux.tenancy.flood` measures the same in engine steps, which are alike on every machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loramux.bench.gateway_http import ask, open_call, quantile
from loramux.bench.gateway_server import Served, in_process
from loramux.bench.gateway_world import add_tenants, prepare
from loramux.errors import LoramuxError

QUIET, FLOOD = ("quiet-0", "quiet-1", "quiet-2"), "flood"
MOST = 1.5
CONCURRENCY = 8
DEFAULTS = {"tenants": {"enabled": True}, "engine": {"prefix_cache": False, "threads": 1}}
CONFIG = {
    "tenants": {"enabled": True},
    "engine": {
        "kv_memory": "64MiB", "max_batch": 16, "max_chunk": 32, "max_prompt_tokens": 32,
        "prefix_cache": False, "threads": 1,
    },
}  # fmt: skip
TOKENS = range(20, 64)  # every base has these, and they end no answer
RACE_REQUESTS, RACE_CALLS, RACE_TOKENS = 20, 100, 400


@dataclass
class Half:
    """Alone, or beside the flood. Waits of the quiet tenants in seconds."""

    waits: list[float] = field(default_factory=list)
    worked: list[float] = field(
        default_factory=list
    )  # what the server worked meanwhile, for anybody
    statuses: dict[str, Counter[int]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "p50_ms": round(1000 * quantile(self.waits, 0.5), 1),
            "p95_ms": round(1000 * quantile(self.waits, 0.95), 1),
            "p50_cpu_ms": round(1000 * quantile(self.worked, 0.5), 1),
            "p95_cpu_ms": round(1000 * quantile(self.worked, 0.95), 1),
            "calls": len(self.waits),
            "statuses": {tenant: dict(count) for tenant, count in self.statuses.items()},
        }


async def half(
    served: Served, keys: dict[str, str], *, rate: float, factor: float, seconds: float, seed: int,
    prompt_tokens: int, answer_tokens: int,
) -> Half:  # fmt: skip
    """`factor` 0: without the flood. Whoever is quiet sends the same either way."""
    found, calls = Half(), set()
    senders = {**dict.fromkeys(QUIET, rate), **({FLOOD: rate * factor} if factor else {})}
    until = time.perf_counter() + seconds

    async def one(tenant: str, prompt: list[int], due: float) -> None:
        body = {
            "model": "base", "prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, "stream": True,
        }  # fmt: skip
        before = served.cpu_s
        async with open_call(served.port, body, key=keys[tenant]) as answer:
            found.statuses.setdefault(tenant, Counter())[answer.status] += 1
            if answer.status != 200:
                await answer.body()
                return
            is_first = True
            async for _ in answer.events():
                if is_first and tenant != FLOOD:
                    found.waits.append(time.perf_counter() - due)
                    found.worked.append(served.cpu_s - before)
                is_first = False

    async def send(tenant: str, rate: float) -> None:
        draw = random.Random(f"{seed} {tenant}")
        due = time.perf_counter()
        while (due := due + draw.expovariate(rate)) < until:
            prompt = draw.choices(TOKENS, k=prompt_tokens)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.add(task := asyncio.ensure_future(one(tenant, prompt, due)))
            task.add_done_callback(calls.discard)

    await asyncio.gather(*(send(tenant, each) for tenant, each in senders.items()))
    await asyncio.gather(*calls)
    return found


async def compare(served: Served, keys: dict[str, str], **load: Any) -> dict[str, Any]:
    """Alone, then beside the flood."""
    factor = load.pop("factor")
    alone = await half(served, keys, factor=0.0, **load)
    beside = await half(served, keys, factor=factor, **load)
    times = quantile(beside.waits, 0.95) / quantile(alone.waits, 0.95)
    worked = quantile(beside.worked, 0.95) / quantile(alone.worked, 0.95)
    return {
        "alone": alone.as_json(), "beside": beside.as_json(), "times": round(times, 2),
        "times_cpu": round(worked, 2),
    }  # fmt: skip


# --- Races ------------------------------------------------------------------------------------------


@dataclass
class Race:
    """What got through of a limit that lets `allowed` calls through."""

    kind: str
    allowed: int
    let_through: int
    statuses: Counter[int]
    without_retry_after: int

    @property
    def overspent(self) -> int:
        return max(0, self.let_through - self.allowed)


async def race(served: Served, key: str, kind: str, calls: int = RACE_CALLS) -> Race:
    """All calls at once; a tenant of its own, whose `kind` per minute is limited."""
    body = {"model": "base", "prompt": "w1 w2 w3 w4", "max_tokens": 16, "temperature": 0}
    replies = await asyncio.gather(*(ask(served.port, body, key=key) for _ in range(calls)))
    statuses = Counter(reply.status for reply in replies)
    if kind == "requests":
        allowed, spent = RACE_REQUESTS, statuses[200]
    else:
        # In calls: each is charged what it used.
        used = [r.json()["usage"]["total_tokens"] for r in replies if r.status == 200]
        each = max(used)
        allowed, spent = RACE_TOKENS // each, -(-sum(used) // each)
    lost = sum(r.status == 429 and "retry-after" not in r.headers for r in replies)
    return Race(kind, allowed, spent, statuses, lost)


def race_tenants(tenancy: Any, number: int) -> dict[str, str]:
    """A tenant per kind, with fresh minutes; kind -> key."""
    limits = {
        "requests": {"requests_per_minute": RACE_REQUESTS},
        "tokens": {"tokens_per_minute": RACE_TOKENS},
    }
    made: dict[str, str] = {}
    for kind, limit in limits.items():
        made[kind] = add_tenants(tenancy, [f"race-{kind}-{number}"], **limit).popitem()[1]
    return made


async def races(served: Served, tenancy: Any, count: int) -> list[Race]:
    keys = [race_tenants(tenancy, number) for number in range(count)]
    await asyncio.sleep(1.0)  # until the server knows them
    return [await race(served, key, kind) for each in keys for kind, key in each.items()]


def main() -> int:
    from loramux.registry import Registry
    from loramux.server.build import base_folder
    from loramux.tenancy import Tenancy

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--defaults", action="store_true", help="steps as the server has them, not small ones"
    )
    parser.add_argument(
        "--base", help="a folder or a name of `loramux fetch`; a tiny one without it"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="calls per second and quiet tenant")
    parser.add_argument("--factor", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each half of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--races", type=int, help="races instead of floods, this many of each kind")
    given = parser.parse_args()
    if min(given.rate, given.factor, given.seconds, given.rounds) <= 0:
        parser.error("--rate, --factor, --seconds and --rounds must be above 0")
    try:
        base = None if given.base is None else base_folder(given.base).resolve()
    except LoramuxError as error:
        parser.error(f"--base: {error}")
    with tempfile.TemporaryDirectory(prefix="loramux-flood-") as folder, ExitStack() as stack:
        home = Path(folder)
        if base is None:
            prepare(home, 1)
        else:
            (home / "base").symlink_to(base)
        registry = stack.enter_context(Registry.open(home / "registry"))
        tenancy = stack.enter_context(Tenancy.open(registry.database))
        keys = add_tenants(tenancy, [*QUIET, FLOOD], max_concurrency=CONCURRENCY)
        config = DEFAULTS if given.defaults else CONFIG
        served = stack.enter_context(in_process(home, config))
        if given.races is not None:
            done = asyncio.run(races(served, tenancy, given.races))
            over = max(each.overspent for each in done)
            lost = sum(each.without_retry_after for each in done)
            said: dict[str, Any] = {
                "races": len(done), "calls_each": RACE_CALLS, "most_overspent_calls": over,
                "refusals_without_retry_after": lost,
            }  # fmt: skip
            is_bad = over > 1 or bool(lost)
        else:
            load = {
                name: getattr(given, name)
                for name in ("rate", "factor", "seconds", "prompt_tokens", "answer_tokens")
            }
            rounds = [
                asyncio.run(compare(served, keys, seed=seed, **load))
                for seed in range(given.rounds)
            ]
            times = median(each["times"] for each in rounds)
            said = {"rounds": rounds, "median_times": times, "load_average": round(os.getloadavg()[0], 1)}  # fmt: skip
            is_bad = times > MOST
    sys.stdout.write(json.dumps(said) + "\n")
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
