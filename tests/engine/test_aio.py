"""The async front: streams, cancellation, errors and shutdown, with an engine that only counts."""

import asyncio
import gc
import threading
import time

import pytest

from loramux.engine.aio import AsyncEngine, EngineClosedError, EngineFailedError
from loramux.engine.request import Answered, Completion, Delta, Request, SamplingParams


class CountingEngine:
    """Answers every request with max_tokens numbers, one per sample and step; keeps a diary."""

    def __init__(self, step_s=0.001, fail_at=None, waits=0):
        self.running, self.done, self.aborted, self.threads = {}, {}, [], set()
        self.num_steps, self.is_closed, self.most, self.added = 0, False, 0, 0
        self.step_s, self.fail_at, self.waits = step_s, fail_at, waits
        self.idle_steps, self.adding = 0, threading.Event()

    def add_request(self, request):
        self.threads.add(threading.get_ident())
        if request.adapter == "slow":
            self.adding.set()
            time.sleep(0.05)
        if request.adapter == "unknown":
            raise ValueError("no adapter 'unknown'")
        self.added += 1
        name = request.id or f"request-{self.added}"
        assert name not in self.running
        self.running[name] = (request, [[] for _ in range(request.params.n)])
        self.most = max(self.most, len(self.running))
        return name

    def abort(self, name):
        self.threads.add(threading.get_ident())
        if name in self.running:
            self.aborted.append(name)
            self.done[name] = self._completions(name, "abort")

    def has_work(self):
        return bool(self.running)

    def step(self):
        self.threads.add(threading.get_ident())
        if self.waits > 0:
            self.waits -= 1
            self.idle_steps += 1
            return []
        time.sleep(self.step_s)
        self.num_steps += 1
        if self.num_steps == self.fail_at:
            raise RuntimeError("out of luck")
        deltas = []
        for name, (request, samples) in list(self.running.items()):
            # Sample j is j tokens shorter: they do not end together.
            for index, tokens in enumerate(samples):
                wanted = request.params.max_tokens - index
                if len(tokens) >= wanted:
                    continue
                tokens.append(len(tokens))
                reason = "length" if len(tokens) == wanted else None
                deltas.append(
                    Delta(
                        request_id=name, index=index, text=f"{tokens[-1]} ", token_ids=(tokens[-1],),
                        finish_reason=reason,
                    )
                )  # fmt: skip
            if all(len(t) >= request.params.max_tokens - i for i, t in enumerate(samples)):
                self.done[name] = self._completions(name, "length")
        return deltas

    def _completions(self, name, reason):
        request, samples = self.running.pop(name)
        return [
            Completion(
                request_id=name, index=index, tenant=request.tenant, token_ids=tuple(tokens),
                text="".join(f"{t} " for t in tokens), finish_reason=reason,
                answered=Answered("base"), prompt_tokens=1,
            )
            for index, tokens in enumerate(samples)
        ]  # fmt: skip

    def completion(self, name):
        return self.done.pop(name, None)

    def close(self):
        self.is_closed = True


def request(num=5, n=1, **options):
    return Request(prompt="hi", params=SamplingParams(max_tokens=num, n=n), **options)


def run(scenario, **options):
    """Run `scenario(front, engine)` and check that nothing is left behind."""
    engine = CountingEngine(**options)

    async def main():
        async with asyncio.timeout(20):
            async with AsyncEngine(engine) as front:
                return await scenario(front, engine)

    result = asyncio.run(main())
    assert engine.is_closed
    assert not engine.running and not engine.done
    assert len(engine.threads) <= 1 and threading.get_ident() not in engine.threads
    return result


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def test_a_stream_brings_every_delta_in_order():
    async def scenario(front, engine):
        return [delta async for delta in front.stream(request(5))]

    deltas = run(scenario)
    assert [delta.token_ids for delta in deltas] == [(i,) for i in range(5)]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]


def test_a_text_is_a_request_to_the_base():
    async def scenario(front, engine):
        return await front.generate(["one", [1, 2]], SamplingParams(max_tokens=3))

    assert [[c.token_ids for c in of] for of in run(scenario)] == [[(0, 1, 2)]] * 2


def test_generate_keeps_order_and_samples_and_runs_all_together():
    async def scenario(front, engine):
        made = await front.generate([request(9), request(4, n=3), request(2)])
        assert engine.most == 3
        return made

    made = run(scenario)
    assert [[len(c.token_ids) for c in of] for of in made] == [[9], [4, 3, 2], [2]]
    assert [c.index for c in made[1]] == [0, 1, 2]


def test_a_stream_of_several_samples_ends_with_the_last_of_them():
    async def scenario(front, engine):
        return [delta async for delta in front.stream(request(4, n=3))]

    deltas = run(scenario)
    assert len(deltas) == 4 + 3 + 2
    assert sum(delta.finish_reason == "length" for delta in deltas) == 3


def test_a_hundred_streams_share_one_engine():
    async def one(front, num):
        return "".join([delta.text async for delta in front.stream(request(num))])

    async def scenario(front, engine):
        return await asyncio.gather(*(one(front, 1 + i % 7) for i in range(100)))

    texts = run(scenario)
    assert texts == ["".join(f"{t} " for t in range(1 + i % 7)) for i in range(100)]


def test_a_refused_request_raises_where_it_was_asked_and_nowhere_else():
    async def scenario(front, engine):
        other = asyncio.ensure_future(front.generate([request(20)]))
        with pytest.raises(ValueError, match="unknown"):
            async for _ in front.stream(request(adapter="unknown")):
                pass
        return await other

    assert len(run(scenario)[0][0].token_ids) == 20


def test_a_refused_request_takes_the_others_of_its_generate_with_it():
    async def scenario(front, engine):
        with pytest.raises(ValueError, match="unknown"):
            await front.generate([request(10_000), request(adapter="unknown")])
        await until(lambda: not engine.running)
        return engine.aborted

    assert run(scenario) == ["request-1"]


def test_leaving_a_stream_aborts_its_request():
    async def scenario(front, engine):
        async for delta in front.stream(request(10_000)):
            if delta.token_ids == (3,):
                break
        await until(lambda: engine.aborted)
        assert not engine.running

    run(scenario)


def test_cancelling_a_consumer_aborts_its_request_and_no_other():
    async def consume(front, num):
        return [delta async for delta in front.stream(request(num, id=f"of {num}"))]

    async def scenario(front, engine):
        long = asyncio.ensure_future(consume(front, 10_000))
        short = asyncio.ensure_future(consume(front, 50))
        await until(lambda: len(engine.running) == 2)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert len(await short) == 50
        assert engine.aborted == ["of 10000"]

    run(scenario)


def test_cancelling_before_the_request_was_taken_leaves_nothing_behind():
    async def scenario(front, engine):
        blocker = asyncio.ensure_future(front.generate([request(3)]))
        await until(lambda: engine.running)
        tasks = [asyncio.ensure_future(front.generate([request(10_000)])) for _ in range(5)]
        await asyncio.sleep(0)  # ordered, but a step is under way
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await blocker
        await until(lambda: not engine.running)

    run(scenario, step_s=0.05)


def test_cancelling_while_the_request_is_taken_aborts_it():
    async def scenario(front, engine):
        task = asyncio.ensure_future(front.generate([request(10_000, adapter="slow")]))
        await until(engine.adding.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: engine.aborted)
        assert not engine.running

    run(scenario)


def test_aborting_by_id_ends_the_stream_of_whoever_reads_it():
    async def consume(front):
        return [delta async for delta in front.stream(request(10_000, n=2, id="x"))]

    async def scenario(front, engine):
        reader = asyncio.ensure_future(consume(front))
        await until(lambda: engine.num_steps > 3)
        await front.abort("x")
        await front.abort("x")
        return await reader

    deltas = run(scenario)
    assert [(d.index, d.finish_reason) for d in deltas[-2:]] == [(0, "abort"), (1, "abort")]


def test_a_failing_step_reaches_every_waiter_and_later_requests():
    async def scenario(front, engine):
        waiters = [asyncio.ensure_future(front.generate([request(100)])) for _ in range(3)]
        errors = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(error, EngineFailedError) for error in errors)
        assert len({id(error) for error in errors}) == 3
        assert all(str(error.__cause__) == "out of luck" for error in errors)
        with pytest.raises(EngineFailedError, match="out of luck"):
            await front.generate([request(1)])
        engine.running.clear()

    run(scenario, fail_at=10)


def test_shutdown_waits_for_what_runs_and_takes_nothing_new():
    async def scenario(front, engine):
        running = asyncio.ensure_future(front.generate([request(40)]))
        await until(lambda: engine.running)
        closing = asyncio.ensure_future(front.shutdown())
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="shut down"):
            await front.generate([request(1)])
        await closing
        assert engine.is_closed
        assert len((await running)[0][0].token_ids) == 40

    run(scenario)


def test_immediate_shutdown_aborts_what_runs():
    async def scenario(front, engine):
        running = asyncio.ensure_future(front.generate([request(100_000)]))
        await until(lambda: engine.num_steps > 2)
        started = time.perf_counter()
        await front.shutdown(finish=False)
        assert time.perf_counter() - started < 5
        with pytest.raises(EngineClosedError, match="before the answer"):
            await running
        assert len(engine.aborted) == 1

    run(scenario)


def test_immediate_shutdown_overtakes_a_patient_one():
    async def scenario(front, engine):
        running = asyncio.ensure_future(front.generate([request(100_000)]))
        await until(lambda: engine.running)
        patient = asyncio.ensure_future(front.shutdown())
        impatient = asyncio.ensure_future(front.shutdown())
        await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.sleep(0)
        assert not patient.done()
        await front.shutdown(finish=False)
        await patient
        assert isinstance((await asyncio.gather(running, return_exceptions=True))[0], ValueError)

    run(scenario)


def test_an_error_in_the_block_shuts_down_at_once():
    engine = CountingEngine()

    async def main():
        async with AsyncEngine(engine) as front:
            asyncio.ensure_future(front.generate([request(100_000)])).add_done_callback(
                lambda task: task.exception()
            )
            await until(lambda: engine.running)
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        asyncio.run(main())
    assert engine.is_closed and not engine.running


def test_call_runs_between_steps_on_the_engines_thread():
    async def scenario(front, engine):
        running = asyncio.ensure_future(front.generate([request(20)]))
        name = await front.call(lambda e: (e is engine, threading.current_thread().name))
        with pytest.raises(ZeroDivisionError):
            await front.call(lambda e: 1 / 0)
        await running
        return name

    assert run(scenario) == (True, "loramux-engine")


def test_waiting_for_an_adapter_does_not_keep_a_core_busy(monkeypatch):
    monkeypatch.setattr("loramux.engine.aio.QUICK_STEP_S", 60.0)  # on a busy machine too

    async def scenario(front, engine):
        started = time.perf_counter()
        await front.generate([request(1)])
        return time.perf_counter() - started

    assert run(scenario, waits=50) >= 0.04


def test_an_idle_engine_takes_no_steps():
    async def scenario(front, engine):
        await front.generate([request(2)])
        steps = engine.num_steps
        await asyncio.sleep(0.05)
        assert engine.num_steps == steps
        await front.generate([request(2)])

    run(scenario)


def test_tasks_of_two_event_loops_are_served():
    engine = CountingEngine()
    front = AsyncEngine(engine)
    got = {}

    def elsewhere(num):
        got[num] = asyncio.run(front.generate([request(num)]))

    threads = [threading.Thread(target=elsewhere, args=(num,)) for num in (5, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    asyncio.run(front.shutdown())
    assert {num: len(made[0][0].token_ids) for num, made in got.items()} == {5: 5, 8: 8}


def test_a_closed_event_loop_does_not_hurt_the_others():
    engine = CountingEngine()
    front = AsyncEngine(engine)
    loop = asyncio.new_event_loop()
    stream = front.stream(request(30))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert len(asyncio.run(front.generate([request(40)]))[0][0].token_ids) == 40
    asyncio.run(front.shutdown())
    del stream
    gc.collect()
