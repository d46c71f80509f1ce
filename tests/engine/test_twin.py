"""X-LoRA in the engine: its pass of the bare base has keys and values that go wherever those of the step go."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import loramux
from conformance.cases import Maker, every_variant
from engine.crowd import (
    assert_close,
    build_engine,
    dense_logits,
    greedy,
    load_all,
    random_prompt,
    save_variants,
)
from engine.helpers import assert_idle, record_samples, run_all
from loramux.engine import twin
from loramux.engine.kv import KVPool
from pico import build_pico

NAME = "xlora-plain"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("twin")
    chosen = [v for v in every_variant() if v.name in (NAME, "lora-plain")]
    return save_variants(Maker(root / "experts"), root, chosen, "llama")


@pytest.fixture(scope="module")
def core(folders: dict[str, Path]) -> loramux.Handle:
    return load_all(build_pico("llama"), folders)


def test_a_prompt_found_in_the_prefix_cache_brings_the_bases_keys_along(
    folders: dict[str, Path], core: loramux.Handle
) -> None:
    prompt = random_prompt(random.Random(1), 40, 40)
    with build_engine() as engine:
        engine.add_adapter(NAME, folders[NAME])
        seen = record_samples(engine)
        for number in range(2):
            done = run_all(engine, [greedy([*prompt, number], NAME, id=f"r{number}")])
            (completion,) = done[f"r{number}"]
            assert completion.error is None and completion.token_ids
            whole = [*prompt, number, *completion.token_ids]
            wanted = dense_logits(core, NAME, whole, len(prompt) + 1)
            for place in range(len(completion.token_ids)):
                assert_close(seen[f"r{number}", 0, len(prompt) + 1 + place], wanted[place], place)
        assert completion.cached_tokens >= 32
        assert_idle(engine)


class Unwritten(KVPool):
    """Holds NaN wherever nothing was written: a block that was not copied shows in every number that reads it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for tensor in (*self.keys_LBGDTP, *self.values_LBGTDP):
            tensor.fill_(float("nan"))


def test_samples_that_part_inside_a_block_copy_it_in_both_pools(
    folders: dict[str, Path], core: loramux.Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "KVPool", Unwritten)
    prompt = random_prompt(random.Random(2), 19, 19)
    params = loramux.SamplingParams(
        max_tokens=6, n=3, temperature=1.5, seed=4, ignore_eos=True, logprobs=1
    )
    with build_engine() as engine:
        engine.add_adapter(NAME, folders[NAME])
        seen = record_samples(engine)
        asked = loramux.Request(prompt=prompt, adapter=NAME, params=params, id="r")
        samples = run_all(engine, [asked])["r"]
        assert len({completion.token_ids for completion in samples}) > 1
        for index, completion in enumerate(samples):
            assert completion.error is None and len(completion.token_ids) == 6
            whole = [*prompt, *completion.token_ids]
            wanted = dense_logits(core, NAME, whole, len(prompt))
            for place in range(len(completion.token_ids)):
                assert_close(seen["r", index, len(prompt) + place], wanted[place], (index, place))


def test_who_is_preempted_or_leaves_changes_nothing_for_the_others(
    folders: dict[str, Path], core: loramux.Handle
) -> None:
    draw = random.Random(3)
    prompts = {f"r{i}": random_prompt(draw, 18, 24) for i in range(5)}
    with build_engine() as engine:
        block = engine.stats()["kv_bytes"] // engine.blocks.num_blocks
    with build_engine(kv_memory=20 * block, prefix_cache=False) as engine:
        engine.add_adapter(NAME, folders[NAME])
        for request_id, prompt in prompts.items():
            engine.add_request(greedy(prompt, NAME, 14, id=request_id))
        for _ in range(3):
            engine.step()
        engine.abort("r0")
        while engine.has_work():
            engine.step()
        assert engine.stats()["scheduler"]["num_preemptions"] > 0
        for request_id, prompt in prompts.items():
            done = engine.completion(request_id)
            assert done is not None
            if request_id == "r0":
                assert done[0].finish_reason == "abort"
                continue
            whole = [*prompt, *done[0].token_ids]
            wanted = dense_logits(core, NAME, whole, len(prompt))[:-1].argmax(-1)
            assert wanted.tolist() == list(done[0].token_ids)
        assert_idle(engine)


def test_the_second_pool_is_made_when_it_is_needed_and_counted(folders: dict[str, Path]) -> None:
    with build_engine() as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        before = engine.stats()["kv_bytes"]
        run_all(engine, [greedy([5, 6, 7], "lora-plain", id="plain")])
        assert engine.stats()["kv_bytes"] == before
        run_all(engine, [greedy([5, 6, 7], NAME, id="twice")])
        assert engine.stats()["kv_bytes"] == 2 * before


def test_without_room_for_it_the_request_ends_alone_and_says_what_to_do(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(twin, "KVPool", full)
    with build_engine() as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        asked = [greedy([5, 6, 7], name, id=name) for name in folders]
        done = run_all(engine, asked)
        assert done["lora-plain"][0].finish_reason == "length"
        error = done[NAME][0].error
        assert error is not None
        assert "second KV pool" in error
        assert "kv_memory" in error
        assert_idle(engine)
