"""What a flooding tenant does to the others' time to the first token: in engine steps, and by the clock.

    python -m loramux.tenancy.flood --base smollm2-135m --seconds 60

Why both: steps are the same on every machine and say whether the order of service is fair; the clock also sees that a
full batch makes each step longer, and that a busy engine is in the middle of a step when a request comes. Requests pass
the door as in the server: a tenant beyond its concurrency is refused.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loramux.tenancy.caller import Caller, Limits
from loramux.tenancy.errors import QuotaError
from loramux.tenancy.quotas import Quotas

if TYPE_CHECKING:
    from loramux.engine.aio import AsyncEngine
    from loramux.engine.engine import Engine
    from loramux.engine.request import Request

FLOOD = "flood"
FIRST_TOKEN = 10  # random prompts use ids from here on; the first few are special


@dataclass(frozen=True)
class Load:
    """Requests come at random, `rate` per second (or step) from each quiet tenant, `factor` times that from the flood.

    max_concurrency: the limit of every tenant; leave rows of the engine's batch beyond it.
    """

    rate: float
    num_quiet: int = 3
    factor: float = 50.0
    prompt_tokens: int = 48
    answer_tokens: int = 16
    max_concurrency: int | None = 12
    vocab: int = 90
    seed: int = 0

    def callers(self, floods: bool) -> list[tuple[Caller, float]]:
        """Who sends, and how much."""
        limits = Limits.from_dict(
            {**Limits.none().to_dict(), "max_concurrency": self.max_concurrency}
        )
        scopes = frozenset({"infer"})
        found = [
            (Caller(f"quiet-{i}", f"k{i}", scopes, limits=limits), self.rate)
            for i in range(self.num_quiet)
        ]
        if floods:
            found.append((Caller(FLOOD, "kf", scopes, limits=limits), self.rate * self.factor))
        return found

    def request(self, draw: random.Random, caller: Caller) -> Request:
        from loramux.engine.request import Request, SamplingParams

        prompt = [draw.randrange(FIRST_TOKEN, self.vocab) for _ in range(self.prompt_tokens)]
        params = SamplingParams(max_tokens=self.answer_tokens, ignore_eos=True)
        return Request(prompt=prompt, params=params, tenant=caller.tenant)


@dataclass
class Measured:
    """Waits for the first token, tokens served and requests refused, by tenant."""

    waits: dict[str, list[float]] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def p95_of_others(self) -> float:
        """Of all tenants but the flood."""
        waits = sorted(
            w for tenant, all_of in self.waits.items() if tenant != FLOOD for w in all_of
        )
        if not waits:
            raise ValueError("no quiet tenant was answered; let it run for longer")
        return waits[min(len(waits) - 1, int(0.95 * len(waits)))]


def in_steps(engine: Engine, load: Load, *, num_steps: int, floods: bool) -> Measured:
    """Let the load come for so many steps of an engine; waits are numbers of steps, the same in every run."""
    # Each its own, so that the quiet ones send the same with the flood as without.
    senders = [
        (caller, rate, random.Random(f"{load.seed} {caller.tenant}"))
        for caller, rate in load.callers(floods)
    ]
    quotas, found = Quotas(), Measured()
    holds: dict[str, tuple[str, int, ExitStack]] = {}
    for step in range(num_steps):
        for caller, rate, draw in senders:
            for _ in range(_arrivals(draw, rate)):
                request = load.request(draw, caller)
                hold = _enter(quotas, caller, found)
                if hold is not None:
                    holds[engine.add_request(request)] = (caller.tenant, step, hold)
        if not engine.has_work():
            continue
        for delta in engine.step():
            if delta.request_id not in holds:
                continue
            tenant, came, hold = holds[delta.request_id]
            found.served[tenant] += len(delta.token_ids)
            if came >= 0 and delta.token_ids:
                found.waits.setdefault(tenant, []).append(step - came + 1)
                holds[delta.request_id] = (tenant, -1, hold)
            if delta.finish_reason is not None:
                hold.close()
                del holds[delta.request_id]
                engine.completion(delta.request_id)
    for request_id, (_, _, hold) in holds.items():
        engine.forget(request_id)
        hold.close()
    quotas.check_integrity()
    return found


async def on_clock(front: AsyncEngine, load: Load, *, seconds: float, floods: bool) -> Measured:
    """Let the load come for so many seconds; waits are seconds."""
    quotas, found = Quotas(), Measured()
    until = time.perf_counter() + seconds
    running: set[asyncio.Task[None]] = set()

    async def send(caller: Caller, rate: float, seed: int) -> None:
        draw = random.Random(seed)
        while (wait := draw.expovariate(rate)) + time.perf_counter() < until:
            await asyncio.sleep(wait)
            task = asyncio.create_task(ask(caller, load.request(draw, caller)))
            running.add(task)
            task.add_done_callback(running.discard)

    async def ask(caller: Caller, request: Request) -> None:
        hold = _enter(quotas, caller, found)
        if hold is None:
            return
        with hold:
            start, is_first = time.perf_counter(), True
            async for delta in front.stream(request):
                found.served[caller.tenant] += len(delta.token_ids)
                if is_first and delta.token_ids:
                    is_first = False
                    found.waits.setdefault(caller.tenant, []).append(time.perf_counter() - start)

    senders: list[Awaitable[None]] = [
        send(caller, rate, load.seed * 1000 + i)
        for i, (caller, rate) in enumerate(load.callers(floods))
    ]
    await asyncio.gather(*senders)
    await asyncio.gather(*running)
    quotas.check_integrity()
    return found


def _enter(quotas: Quotas, caller: Caller, found: Measured) -> ExitStack | None:
    """The door: None for a request that is refused."""
    with ExitStack() as stack:
        try:
            stack.enter_context(quotas.hold(caller))
        except QuotaError:
            found.refused[caller.tenant] += 1
            return None
        return stack.pop_all()
    return None


def _arrivals(draw: random.Random, rate: float) -> int:
    """How many come in one step: a Poisson process."""
    count, left = 0, draw.expovariate(rate) if rate else 2.0
    while left < 1:
        count += 1
        left += draw.expovariate(rate)
    return count


def compare(measure: Callable[[bool], Measured]) -> dict[str, Any]:
    """The others' wait alone and beside the flood."""
    alone, beside = measure(False), measure(True)
    p95 = alone.p95_of_others(), beside.p95_of_others()
    return {
        "p95_alone": p95[0],
        "p95_beside": p95[1],
        "times": p95[1] / p95[0],
        "num_alone": sum(len(waits) for waits in alone.waits.values()),
        "num_beside": sum(len(w) for tenant, w in beside.waits.items() if tenant != FLOOD),
        "served": dict(beside.served),
        "refused": dict(beside.refused),
    }


def _rows(found: dict[str, Any], rounds: int) -> Iterator[str]:
    for i in range(rounds):
        row = found["rounds"][i]
        yield (
            f"round {i + 1}: p95 of the first token {row['p95_alone'] * 1000:.0f} ms alone, "
            f"{row['p95_beside'] * 1000:.0f} ms beside the flood, {row['times']:.2f} times "
            f"({row['num_alone']} and {row['num_beside']} requests)"
        )


def main(argv: list[str] | None = None) -> int:
    """By the clock, over a real base; exit code 1 if a flood costs the others more than `--most` times."""
    import argparse
    import json
    import sys

    parser = argparse.ArgumentParser(prog="python -m loramux.tenancy.flood", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=0.05, help="requests per second and tenant")
    parser.add_argument("--factor", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each half of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-prompt-tokens", type=int, default=32)
    parser.add_argument("--max-pauses", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--most", type=float, default=1.5)
    args = parser.parse_args(argv)
    found = _run(args)
    sys.stdout.write("\n".join([*_rows(found, args.rounds), json.dumps(found)]) + "\n")
    return int(found["median_times"] > args.most)


def _run(args: Any) -> dict[str, Any]:
    from statistics import median

    from loramux.engine.aio import AsyncEngine
    from loramux.engine.engine import Engine

    rounds = []
    for seed in range(args.rounds):
        load = Load(
            rate=args.rate, factor=args.factor, prompt_tokens=args.prompt_tokens,
            answer_tokens=args.answer_tokens, max_concurrency=args.concurrency, vocab=10_000, seed=seed,
        )  # fmt: skip

        def measure(floods: bool, load: Load = load) -> Measured:
            engine = Engine(
                args.base, max_batch=args.max_batch, max_prompt_tokens=args.max_prompt_tokens,
                max_chunk=args.max_prompt_tokens, max_pauses=args.max_pauses, prefix_cache=False,
            )  # fmt: skip

            async def run() -> Measured:
                async with AsyncEngine(engine) as front:
                    return await on_clock(front, load, seconds=args.seconds, floods=floods)

            return asyncio.run(run())

        rounds.append(compare(measure))
    return {"rounds": rounds, "median_times": median(row["times"] for row in rounds)}


if __name__ == "__main__":
    raise SystemExit(main())
