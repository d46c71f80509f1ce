"""The async front over the real engine."""

import asyncio

import pytest

from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams


def test_the_real_engine_streams_cancels_and_gives_everything_back(pico, tokenizer):
    engine = Engine(pico, tokenizer, kv_memory="4MiB", fuse=False)
    free = engine.blocks.num_free
    asked = Request(prompt="hello", params=SamplingParams(max_tokens=12, n=2, ignore_eos=True))
    alone = [completion.text for completion in engine.generate([asked])[0]]

    async def leave(front):
        long = SamplingParams(max_tokens=100, ignore_eos=True)
        async for _ in front.stream("hello", long):
            break

    async def main():
        async with AsyncEngine(engine) as front:
            texts = ["", ""]
            leaver = asyncio.ensure_future(leave(front))
            async for delta in front.stream(asked):
                texts[delta.index] += delta.text
            await leaver
            with pytest.raises(ValueError, match="no-such-name"):
                await front.generate([Request(prompt="x", adapter="no-such-name")])
            while await front.call(lambda e: e.has_work()):
                await asyncio.sleep(0.01)
            assert await front.call(lambda e: e.blocks.num_free) == free
            await front.call(lambda e: e.check_integrity())
            return texts

    assert asyncio.run(main()) == alone


def test_an_answer_streams_and_then_says_what_answered(pico, tokenizer):
    engine = Engine(pico, tokenizer, kv_memory="4MiB", fuse=False)
    asked = Request(prompt="hello", params=SamplingParams(max_tokens=5, n=2, ignore_eos=True))

    async def main():
        async with AsyncEngine(engine) as front:
            answer = front.answer(asked)
            assert answer.completions == []
            texts = ["", ""]
            async for delta in answer:
                texts[delta.index] += delta.text
            assert [done.text for done in answer.completions] == texts
            assert all(done.answered.base for done in answer.completions)
            left = front.answer(asked)
            async for _ in left:
                break
            await left.aclose()
            while await front.call(lambda e: e.has_work()):
                await asyncio.sleep(0.01)
            await front.call(lambda e: e.check_integrity())

    asyncio.run(main())
