"""The engine against the core: a request's logits are those of one plain forward, alone and in any mixed batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import loramux
from conformance.cases import (
    Maker,
    Variant,
    every_variant,
    first_variants,
    named,
)
from engine.crowd import (
    assert_close,
    assert_like_core,
    build_engine,
    dense_logits,
    drive,
    greedy,
    load_all,
    random_prompt,
    record,
    save_variants,
)
from pico import build_pico

FAMILIES = ("qwen3", "gemma3", "phi3", "gpt2")


@pytest.fixture(scope="module")
def folders(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_variants(make, tmp_path_factory.mktemp("llama"), every_variant(), "llama")


@pytest.fixture(scope="module")
def crowd(folders: dict[str, Path]) -> loramux.Handle:
    """The same adapters on the core."""
    return load_all(build_pico("llama"), folders)


@pytest.mark.parametrize("variant", [None, *every_variant()], ids=named)
def test_an_answer_alone_is_that_of_one_plain_forward(
    variant: Variant | None, folders: dict[str, Path], crowd: loramux.Handle
):
    name = None if variant is None else variant.name
    with build_engine() as engine:
        if name is not None:
            engine.add_adapter(name, folders[name])
        seen = record(engine)
        prompt = random_prompt(random.Random(3), 12, 12)
        ((completion,),) = engine.generate([greedy(prompt, name, id="a")])
        assert completion.finish_reason == "length", completion.error
        wanted = dense_logits(crowd, name, [*prompt, *completion.token_ids], len(prompt))
        for place in range(len(completion.token_ids)):
            assert_close(seen["a", len(prompt) + place], wanted[place], (name, place))


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_in_a_crowd_is_that_of_one_plain_forward(
    seed: int, folders: dict[str, Path], crowd: loramux.Handle
):
    """Random arrivals, lengths, chunks, preemptions and pauses; every kind of adapter in one batch."""
    draw = random.Random(seed)
    names = [None, *folders]
    options = {
        "kv_memory": draw.choice([30_000, 60_000, "1MiB"]),
        "max_chunk": draw.choice([3, 7, 64]),
        "max_batch": draw.choice([5, 24, 64]),
        "prefix_cache": draw.random() < 0.5,
        "max_pauses": seed % 2 * 3,
    }
    requests = [
        greedy(
            random_prompt(draw),
            draw.choice(names),
            draw.randint(1, 8),
            id=f"r{i}",
            tenant=f"t{i % 3}",
        )
        for i in range(40)
    ]
    with build_engine(**options) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record(engine)
        done = drive(engine, requests, draw)
        assert engine.blocks.num_free == engine.blocks.num_blocks
    assert_like_core(crowd, requests, done, seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_answer_alike(family: str, make: Maker, tmp_path: Path):
    saved = save_variants(make, tmp_path, first_variants(), family)
    handle = load_all(build_pico(family), saved)
    draw = random.Random(1)
    requests = [
        greedy(random_prompt(draw, 18, 30), name, 5, id=f"{name}") for name in [None, *saved]
    ]
    with build_engine(family, max_chunk=7) as engine:
        for name, path in saved.items():
            engine.add_adapter(name, path)
        seen = record(engine)
        done = drive(engine, requests, draw)
    assert_like_core(handle, requests, done, seen)
