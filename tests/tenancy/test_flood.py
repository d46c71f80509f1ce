"""A tenant that floods: what it costs the others, in steps of a real engine over a pico model."""

from __future__ import annotations

import asyncio
import random

import pytest

from loramux.engine.engine import Engine
from loramux.tenancy import Caller, Weights
from loramux.tenancy.flood import FLOOD, Load, Measured, compare, in_steps
from pico import build_pico


def measure(load: Load, floods: bool, num_steps: int = 250) -> Measured:
    engine = Engine(
        build_pico("llama"), kv_memory="8MiB", max_batch=16, max_chunk=16, max_step_tokens=64,
        prefix_cache=False,
    )  # fmt: skip
    try:
        found = in_steps(engine, load, num_steps=num_steps, floods=floods)
        engine.check_integrity()
        return found
    finally:
        engine.close()


@pytest.mark.parametrize("max_concurrency", [12, None])
def test_a_flood_of_fifty_times_leaves_the_others_first_token_within_one_and_a_half(
    max_concurrency,
):
    load = Load(rate=0.03, prompt_tokens=96, max_concurrency=max_concurrency)
    found = compare(lambda floods: measure(load, floods))
    assert found["times"] <= 1.5, found
    assert found["num_beside"] == found["num_alone"] >= 20, "no quiet request is refused or lost"
    assert found["served"][FLOOD] > 3 * sum(
        tokens for tenant, tokens in found["served"].items() if tenant != FLOOD
    ), "the flood uses what the others leave"


def test_what_the_flood_sends_beyond_its_concurrency_is_refused_at_the_door():
    found = measure(Load(rate=0.05, max_concurrency=4), floods=True, num_steps=100)
    assert found.refused[FLOOD] > 50
    assert set(found.refused) == {FLOOD}


def test_the_same_load_takes_the_same_steps_every_time():
    load = Load(rate=0.05)
    first, again = (measure(load, True, num_steps=60) for _ in range(2))
    assert first == again


class Front:
    """Calls the engine at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.num_calls = engine, 0

    async def call(self, function):
        self.num_calls += 1
        return function(self.engine)


def test_the_engine_is_told_a_weight_when_it_is_new_and_only_then():
    engine = Engine(build_pico("llama"), kv_memory="1MiB")
    front = Front(engine)
    weights = Weights(front)

    async def run() -> None:
        for weight in (1.0, 2.0, 2.0, 2.0, 3.0, 1.0, 1.0):
            await weights.apply(Caller("acme", "k", frozenset(), weight=weight))

    asyncio.run(run())
    assert front.num_calls == 3
    engine.close()


def test_a_weight_the_engine_could_not_be_told_is_told_again():
    class Broken(Front):
        async def call(self, function):
            self.num_calls += 1
            raise RuntimeError("the engine failed")

    front = Broken(None)
    weights = Weights(front)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            asyncio.run(weights.apply(Caller("acme", "k", frozenset(), weight=2.0)))
    assert front.num_calls == 2


def test_tokens_served_follow_the_weights_of_tenants_within_ten_per_cent():
    """Both send more than is served; after half the steps the weights change places."""
    engine = Engine(
        build_pico("llama"), kv_memory="2MiB", max_batch=8, max_chunk=16, max_step_tokens=32,
        prefix_cache=False, tenant_weights={"gold": 3.0},
    )  # fmt: skip
    load, draw = Load(rate=1, prompt_tokens=12, answer_tokens=8), random.Random(0)
    callers = {name: Caller(name, "k", frozenset()) for name in ("gold", "plain")}

    def served(num_steps: int) -> dict[str, int]:
        before = engine.stats()["scheduler"]["served"]
        for _ in range(num_steps):
            for caller in callers.values():
                engine.add_request(load.request(draw, caller))
            engine.step()
        after = engine.stats()["scheduler"]["served"]
        return {name: after[name] - before.get(name, 0) for name in callers}

    first = served(150)
    engine.set_tenant_weight("gold", 1.0)
    engine.set_tenant_weight("plain", 3.0)
    second = served(150)
    engine.close()
    assert first["gold"] == pytest.approx(3 * first["plain"], rel=0.1)
    assert second["plain"] == pytest.approx(3 * second["gold"], rel=0.1)
