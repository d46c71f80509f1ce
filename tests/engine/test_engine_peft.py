"""What PEFT can express, the engine answers with the very tokens of `model.generate`, whatever shares the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.crowd import build_engine, greedy, random_prompt
from engine.helpers import InPeft, assert_idle, run_all, shuffled, write_peft
from loramux.engine.request import Request, SamplingParams
from pico import EOS, FAMILIES

ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "wide": {"r": 16, "lora_alpha": 8},
    "one": {"r": 1, "lora_alpha": 2},
}
LLAMA_ONLY = {
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"down_proj": 1, "q_proj": 5},
    },
    "attention": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "first-layer": {"layers_to_transform": [0]},
}


def adapters_of(family: str, root: Path) -> dict[str, Path]:
    settings = {**ADAPTERS, **(LLAMA_ONLY if family == "llama" else {})}
    return {
        name: write_peft(root / name, family, seed, **own)
        for seed, (name, own) in enumerate(settings.items())
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_every_request_the_tokens_of_generate(family: str, tmp_path: Path):
    folders = adapters_of(family, tmp_path)
    draw = random.Random(4)
    requests = [
        greedy(random_prompt(draw, 2, 24), name, draw.randint(4, 12), id=f"{name} {i}")
        for name in [None, *folders]
        for i in range(2)
    ]
    with build_engine(family, max_chunk=6, fuse=True) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        done = run_all(engine, shuffled(draw, requests))
        assert_idle(engine)
    peft = InPeft(folders, family)
    answers = set()
    for request in requests:
        ((completion,), tokens) = done[str(request.id)], request.params.max_tokens
        assert completion.token_ids == peft.generate(request.adapter, request.prompt, tokens), (
            request.id
        )
        answers.add(completion.token_ids)
    assert len(answers) > len(requests) // 2, "the adapters hardly differ: nothing is shown"


def test_an_answer_ends_where_generate_ends(tmp_path: Path):
    """The end token is part of the tokens in both."""
    folders = {"a": write_peft(tmp_path / "a", r=8, seed=1)}
    peft = InPeft(folders)
    draw = random.Random(0)
    prompts = [random_prompt(draw, 3, 12) for _ in range(12)]
    wanted = [peft.generate("a", prompt, 40, eos=EOS) for prompt in prompts]
    assert any(tokens[-1] == EOS for tokens in wanted), "no answer ends: nothing is shown"
    params = SamplingParams(max_tokens=40)
    with build_engine() as engine:
        engine.add_adapter("a", folders["a"])
        done = engine.generate([Request(prompt=p, adapter="a", params=params) for p in prompts])
    for (completion,), tokens in zip(done, wanted, strict=True):
        assert completion.token_ids == tokens
        assert completion.finish_reason == ("stop" if tokens[-1] == EOS else "length")


def test_the_adapters_of_a_batch_may_change_with_every_step(tmp_path: Path):
    """One slot for eight adapters: every request waits for its turn, and none meets another's rows."""
    folders = {f"a{i}": write_peft(tmp_path / f"a{i}", r=1 + i, seed=i) for i in range(8)}
    peft = InPeft(folders)
    draw = random.Random(2)
    requests = [greedy(random_prompt(draw), f"a{i % 8}", 5, id=f"r{i}") for i in range(24)]
    with build_engine(max_slots=1) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        done = run_all(engine, requests)
        assert engine.store.stats().num_slot_evictions >= len(folders) - 1
        assert_idle(engine)
    for request in requests:
        assert done[str(request.id)][0].token_ids == peft.generate(
            request.adapter, request.prompt, 5
        )
