"""Whatever ends a request, its blocks, slots and pins come back, and the engine goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.cases import Maker, every_variant
from engine.crowd import build_engine, greedy, random_prompt, save_variants
from engine.helpers import (
    assert_idle,
    assert_like_plain,
    collect,
    merged,
    record_samples,
    run_all,
    sampled,
    write_peft,
)
from loramux.engine.aio import AsyncEngine, EngineClosedError
from loramux.engine.engine import Engine
from loramux.engine.request import Request
from pico import build_pico


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain adapters of PEFT, and one of every kind with a router."""
    root = tmp_path_factory.mktemp("books")
    found = {f"p{i}": write_peft(root / f"p{i}", r=1 + 3 * i, seed=i) for i in range(4)}
    wanted = ("milora-ste", "mixlora-top2", "mixlora-dynamic", "mole-layer", "mole-prompt")
    variants = [variant for variant in every_variant() if variant.name in wanted]
    return {**found, **save_variants(Maker(root / "experts"), root, variants, "llama")}


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    with build_engine(kv_memory=60_000, max_slots=12, max_chunk=5) as made:
        register(made, folders)
        yield made


def register(engine: Engine, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        engine.add_adapter(name, folder)


def mixed_requests(draw: random.Random, count: int, label: str) -> list[Request]:
    """All kinds of adapters, samples and mixes; lengths up to most of the pool."""
    kinds = [
        None, "p0", "p1", "p2", {"p0": 0.7, "p3": 0.3}, "milora-ste", "mixlora-top2",
        "mixlora-dynamic", "mole-layer", "mole-prompt", {"p1": 0.5, "milora-ste": 0.5},
    ]  # fmt: skip
    return [
        sampled(
            random_prompt(draw, 2, 24), draw.choice(kinds), draw.randint(1, 12),
            n=draw.choice([1, 1, 3]), seed=i, id=f"{label}{i}", tenant=f"t{i % 3}",
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_random_aborts_at_any_time_leave_nothing_behind(seed: int, engine: Engine):
    draw = random.Random(seed)
    requests = mixed_requests(draw, 50, "r")
    waiting: set[str] = set()
    aborted: set[str] = set()
    ended = {}
    while requests or waiting:
        while requests and draw.random() < 0.6:
            waiting.add(engine.add_request(requests.pop()))
        if waiting and draw.random() < 0.4:
            name = draw.choice(sorted(waiting))
            engine.abort(name)
            aborted.add(name)
        engine.step()
        engine.check_integrity()
        engine.scheduler.check_integrity()
        ended.update(collect(engine, waiting))
    assert_idle(engine)
    reasons = {name: {sample.finish_reason for sample in done} for name, done in ended.items()}
    assert all(reasons[name] <= {"abort", "length"} for name in reasons)
    assert sum("abort" in found for found in reasons.values()) >= 10
    assert all(reasons[name] == {"length"} for name in reasons.keys() - aborted)


def test_a_request_aborted_before_its_first_step_never_runs(engine: Engine):
    name = engine.add_request(greedy([5, 6, 7], "p0", id="r"))
    engine.abort(name)
    (done,) = engine.completion(name) or []
    assert (done.finish_reason, done.token_ids) == ("abort", ())
    assert [delta.finish_reason for delta in engine.step()] == ["abort"]
    assert engine.steps == 0 and not engine.has_work()
    assert_idle(engine)


def test_adapters_that_cannot_be_read_end_their_requests_only(
    engine: Engine, folders: dict[str, Path], tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    engine.add_adapter("missing", tmp_path / "nowhere")
    engine.add_adapter("empty", tmp_path / "empty")
    requests = [
        greedy([5, 6, 7], name, 3, id=str(name))
        for name in ("missing", "p0", "empty", None, {"p1": 0.5, "missing": 0.5})
    ]
    done = run_all(engine, requests)
    reasons = {name: found[0].finish_reason for name, found in done.items()}
    assert reasons["p0"] == reasons["None"] == "length"
    assert list(reasons.values()).count("error") == 3
    error = done["missing"][0].error
    assert error is not None and "'missing'" in error and "nowhere" in error
    assert_idle(engine)


def test_a_mix_that_cannot_be_is_refused_when_its_parts_are_known(engine: Engine):
    done = run_all(engine, [greedy([5, 6], {"mixlora-top2": 0.5, "p0": 0.5}, 3, id="r")])
    assert done["r"][0].finish_reason == "error"
    assert done["r"][0].error is not None and "answers alone" in done["r"][0].error
    assert_idle(engine)


def test_a_removed_name_ends_who_waits_and_not_who_runs(engine: Engine, folders: dict[str, Path]):
    running = engine.add_request(greedy([5, 6, 7], "p0", 8, id="running"))
    while not engine.step():
        pass
    waiting = engine.add_request(greedy([5, 6, 7], "p1", 8, id="waiting"))
    engine.remove_adapter("p0")
    engine.remove_adapter("p1")
    done = {}
    names = {running, waiting}
    while names:
        engine.step()
        done.update(collect(engine, names))
    assert done["running"][0].finish_reason == "length"
    assert done["waiting"][0].finish_reason == "error"
    with pytest.raises(ValueError, match="no adapter is named 'p0'"):
        engine.add_request(greedy([5], "p0"))
    assert_idle(engine)
    assert engine.store.stats().num_slots_used == 0
    assert engine.store.stats().num_contents == 0


def test_a_step_that_raises_ends_its_requests_and_later_ones_are_answered(
    engine: Engine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """The error is the caller's to see; nothing of the broken step is used again."""
    draw = random.Random(0)
    for request in mixed_requests(draw, 6, "lost"):
        engine.add_request(request)
    for _ in range(30):
        engine.step()
    layer = engine.model.get_submodule("model.layers.1.mlp")
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    for request in mixed_requests(draw, 6, "broken"):
        engine.add_request(request)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for _ in range(100):
            engine.step()
    handle.remove()
    names = {*engine._open}
    while names:
        engine.step()
        engine.check_integrity()
        for done in collect(engine, names).values():
            assert all(d.finish_reason in ("error", "length") for d in done)
    assert_idle(engine)
    seen = record_samples(engine)
    request = greedy(random_prompt(draw, 20, 20), "p1", 6, id="later")
    done = run_all(engine, [request])
    assert_like_plain(merged({folders["p1"]: 1.0}), request, done["later"], seen)


def step_often(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def test_a_stream_that_is_left_gives_back_what_it_held(engine: Engine):
    stream = engine.stream(greedy([5, 6, 7], "p0", 50))
    assert next(stream).token_ids
    stream.close()
    assert_idle(engine)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (greedy([5] * 200, None, 100), "positions"),
        (greedy([5] * 140, None, 100), "the KV pool holds"),
        (greedy([96], None), "token ids must be"),
        (greedy([], None), "empty"),
        (greedy([5], "nobody"), "no adapter is named 'nobody'"),
        (greedy([5], {"p0": 0.0}), "leave out what has weight 0"),
        (greedy([5], {"p0": float("nan")}), "leave out what has weight 0"),
        (greedy([5], "p0", id="taken"), "under way"),
    ],
)
def test_a_request_that_is_refused_leaves_nothing_behind(
    engine: Engine, request_: Request, text: str
):
    engine.add_request(greedy([5], "p0", id="taken"))
    with pytest.raises(ValueError, match=text):
        engine.add_request(request_)
    engine.abort("taken")
    engine.completion("taken")
    assert_idle(engine)
    assert engine._open == {}


def test_finished_requests_are_forgotten(engine: Engine):
    """What an engine keeps does not grow with the number of its answers."""
    draw = random.Random(1)
    run_all(engine, mixed_requests(draw, 20, "a"))
    assert engine._open == {} and engine.scheduler._records == {}
    assert engine.scheduler._samples == {}
    assert engine.scheduler._tables._chains == {}


# --- The async front over the real engine ------------------------------------------------------------


def test_cancelled_tasks_leave_nothing_behind(folders: dict[str, Path]):
    engine = build_engine(kv_memory=60_000, max_slots=12, max_chunk=5)
    register(engine, folders)
    draw = random.Random(2)

    async def leave(front: AsyncEngine, request: Request, after: int) -> int:
        seen = 0
        async for _ in front.stream(request):
            seen += 1
            if seen > after:
                break
        return seen

    async def main() -> list[object]:
        async with AsyncEngine(engine) as front:
            tasks = [
                asyncio.ensure_future(leave(front, request, draw.randint(0, 30)))
                for request in mixed_requests(draw, 30, "r")
            ]
            for task in draw.sample(tasks, 10):
                await asyncio.sleep(0.01)
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            while await front.call(lambda e: e.has_work()):
                await asyncio.sleep(0.005)
            await front.call(assert_idle)
            assert await front.call(lambda e: e._open) == {}
            return found

    found = asyncio.run(main())
    assert any(isinstance(f, asyncio.CancelledError) for f in found)
    assert sum(isinstance(f, int) for f in found) >= 15


def test_a_shutdown_that_does_not_wait_leaves_nothing_behind(folders: dict[str, Path]):
    model = build_pico("llama")
    engine = build_engine(model=model, kv_memory=60_000, max_slots=12)
    register(engine, folders)

    async def main() -> list[object]:
        front = AsyncEngine(engine)
        requests = [greedy([5, 6, 7], f"p{i % 4}", 40, id=f"r{i}") for i in range(8)]
        tasks = [asyncio.ensure_future(front.generate([request])) for request in requests]
        await asyncio.sleep(0.05)
        await front.shutdown(finish=False)
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())
    assert any(isinstance(f, EngineClosedError) for f in found)
    assert all(isinstance(f, list | EngineClosedError) for f in found)
    assert_idle(engine)
    with build_engine(model=model) as again:  # the model is free for another engine
        assert again.generate([[5, 6, 7]])
