"""The async front over an engine whose own books fail: whoever waits is told, and nobody else suffers."""

from __future__ import annotations

import asyncio

import pytest

from engine.test_aio import CountingEngine, request, until
from loramux.engine.aio import AsyncEngine, EngineFailedError


def fail(*_):
    raise RuntimeError("the books do not add up")


async def outcome(front, wanted):
    """What a consumer gets, which must come soon."""
    async with asyncio.timeout(10):
        try:
            return await front.generate([wanted])
        except Exception as error:
            return error


def test_answers_that_end_in_one_step_are_told_although_one_of_them_cannot_be_handed_out():
    """Regression: those that ended before it waited for ever, and so did it."""
    engine = CountingEngine()
    inner = engine.completion
    engine.completion = lambda name: fail() if name == "b" else inner(name)

    async def main():
        front = AsyncEngine(engine)
        waiting = [asyncio.ensure_future(outcome(front, request(30, id=name))) for name in "abc"]
        found = await asyncio.gather(*waiting)
        await front.shutdown()
        return found

    first, *others = asyncio.run(main())
    assert not isinstance(first, Exception)
    assert all(isinstance(error, EngineFailedError) for error in others)


def test_a_request_that_cannot_be_aborted_ends_with_the_error_and_the_others_go_on():
    """Regression: its consumer waited for ever."""
    engine = CountingEngine()
    engine.abort = fail

    async def main():
        front = AsyncEngine(engine)
        ended, goes_on = (
            asyncio.ensure_future(outcome(front, request(num, id=name)))
            for name, num in (("a", 500), ("b", 60))
        )
        await until(lambda: len(engine.running) == 2)
        with pytest.raises(RuntimeError, match="do not add up"):
            await front.abort("a")
        found = await ended, await goes_on
        engine.running.clear()
        await front.shutdown()
        return found

    error, done = asyncio.run(main())
    assert isinstance(error, EngineFailedError)
    assert len(done[0][0].token_ids) == 60


class Panic(BaseException):
    """As native code raises it, such as a tokenizer's."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_at_shutdown_everybody_is_told_although_the_first_cannot_be_aborted(error):
    """Regression: the others waited for ever."""
    engine = CountingEngine()

    def refuse(_):
        raise error("the books do not add up")

    engine.abort = refuse

    async def main():
        front = AsyncEngine(engine)
        waiting = [asyncio.ensure_future(outcome(front, request(500))) for _ in range(3)]
        await until(lambda: len(engine.running) == 3)
        ending = asyncio.ensure_future(front.shutdown(finish=False))
        found = await asyncio.gather(*waiting)
        await ending
        return found

    assert all(isinstance(error, Exception) for error in asyncio.run(main()))
    assert engine.is_closed
