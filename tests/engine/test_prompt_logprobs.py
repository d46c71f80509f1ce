"""Log-probabilities of prompts: those of one plain forward, however the prompt is cut, cached, shared or preempted."""

import random

import pytest
import torch

from engine.helpers import merged, run_all, write_peft
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams
from pico import build_pico

SCORE = SamplingParams(max_tokens=2, prompt_logprobs=3, logprobs=0, ignore_eos=True)


def plain(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


def assert_plain(done, model, tokens):
    logs = plain(model, tokens)
    found = done.prompt_logprobs
    assert len(found) == len(tokens) and found[0] is None
    for place in range(1, len(tokens)):
        row = logs[place - 1]
        assert found[place].token == tokens[place]
        assert abs(found[place].logprob - row[tokens[place]].item()) < 1e-4
        best = row.topk(3)
        assert [token for token, _ in found[place].top] == best.indices.tolist()
        torch.testing.assert_close(
            torch.tensor([value for _, value in found[place].top]), best.values, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("max_chunk", [5, 512])
def test_prompt_logprobs_are_those_of_a_plain_forward_in_a_mixed_batch(pico, tmp_path, max_chunk):
    folder = write_peft(tmp_path / "law", seed=3)
    draw = random.Random(1)
    prompts = [[draw.randrange(8, 90) for _ in range(size)] for size in (1, 2, 9, 40)]
    with Engine(pico, kv_memory="4MiB", max_chunk=max_chunk, fuse=False) as engine:
        engine.add_adapter("law", folder)
        requests = [
            Request(prompt=prompt, adapter=adapter, params=SCORE, id=f"{adapter}-{place}")
            for place, prompt in enumerate(prompts)
            for adapter in (None, "law")
        ]
        requests.append(Request(prompt=prompts[3], params=SamplingParams(max_tokens=9), id="plain"))
        done = run_all(engine, requests)
    base, law = build_pico("llama"), merged({folder: 1.0})
    for place, prompt in enumerate(prompts):
        assert_plain(done[f"None-{place}"][0], base, prompt)
        assert_plain(done[f"law-{place}"][0], law, prompt)
    assert done["plain"][0].prompt_logprobs == ()


def test_a_cached_prefix_is_run_again_for_those_who_want_its_logprobs(pico):
    prompt = list(range(8, 58))
    with Engine(pico, kv_memory="4MiB", fuse=False) as engine:
        run_all(engine, [Request(prompt=prompt, params=SamplingParams(max_tokens=1), id="warm")])
        found = run_all(
            engine, [Request(prompt=prompt, params=SamplingParams(max_tokens=1), id="hit")]
        )
        assert found["hit"][0].cached_tokens > 0
        done = run_all(engine, [Request(prompt=prompt, params=SCORE, id="score")])["score"][0]
    assert done.cached_tokens == 0
    assert_plain(done, build_pico("llama"), prompt)


def test_the_first_of_several_samples_tells_them(pico):
    prompt = list(range(8, 40))
    params = SamplingParams(max_tokens=2, n=3, prompt_logprobs=3, temperature=1.0, seed=1)
    with Engine(pico, kv_memory="4MiB", fuse=False) as engine:
        done = run_all(engine, [Request(prompt=prompt, params=params, id="n")])["n"]
    assert_plain(done[0], build_pico("llama"), prompt)
    assert [sample.prompt_logprobs for sample in done[1:]] == [(), ()]


def test_a_preempted_prompt_tells_the_same(pico):
    prompts = [[(7 * i + 3 * j) % 80 + 8 for i in range(60)] for j in range(4)]
    params = SamplingParams(max_tokens=40, prompt_logprobs=3, ignore_eos=True)
    with Engine(pico, kv_memory="80KiB", fuse=False) as engine:
        done = run_all(
            engine,
            [
                Request(prompt=p, params=params, id=str(j), tenant=str(j))
                for j, p in enumerate(prompts)
            ],
        )
    assert sum(done[str(j)][0].preemptions for j in range(4)) > 0
    for j, prompt in enumerate(prompts):
        assert_plain(done[str(j)][0], build_pico("llama"), prompt)
