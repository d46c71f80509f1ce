"""Weighted mixes, ranks, sites and samples in one batch: each as if its weights were merged and it ran alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.crowd import build_engine, greedy, random_prompt
from engine.helpers import (
    assert_idle,
    assert_like_plain,
    merged,
    record_samples,
    run_all,
    sampled,
    shuffled,
    write_peft,
)
from loramux.engine.request import Request
from loramux.ops import cpu, pool
from pico import build_pico

ADAPTERS = {
    "a": {"r": 4},
    "b": {"r": 7, "use_rslora": True},
    "one": {"r": 1},
    "r64": {"r": 64, "lora_alpha": 8},
    "r256": {"r": 256, "lora_alpha": 8},
    "q": {"target_modules": ["q_proj"], "r": 3},
    "kv": {"target_modules": ["k_proj", "v_proj"], "r": 16},
    "ffn": {"target_modules": ["gate_proj", "down_proj"], "r": 5},
    "up1": {"target_modules": ["up_proj"], "layers_to_transform": [1], "r": 200, "lora_alpha": 9},
    "dora": {"use_dora": True},
    "dora-o": {"use_dora": True, "target_modules": ["o_proj", "up_proj"], "r": 12},
}
MIXES: list[str | dict[str, float] | None] = [
    None,
    *ADAPTERS,
    {"a": 0.7, "b": 0.3},
    {"b": 0.3, "a": 0.7},
    {"a": 1.5, "b": -0.5},
    {"a": 0.25},
    {"q": 0.5, "ffn": 0.5},
    {"one": 0.2, "r64": 0.3, "kv": 0.5},
    {"dora": 0.6, "a": 0.4},
    {"dora": 0.5, "dora-o": 0.5},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peft")
    return {
        name: write_peft(root / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def dense(folders: dict[str, Path]) -> Mapping[str, nn.Module]:
    """A model with merged weights for every mix."""
    return {
        str(mix): build_pico("llama")
        if mix is None
        else merged({folders[n]: w for n, w in Request(prompt=[4], adapter=mix).mix})
        for mix in MIXES
    }


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_a_mix_alone_is_the_base_with_merged_weights(
    mix: str | dict[str, float] | None, folders: dict[str, Path], dense: Mapping[str, nn.Module]
):
    request = greedy(random_prompt(random.Random(5), 9, 9), mix, 4, id="r")
    with build_engine() as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record_samples(engine)
        done = run_all(engine, [request])
    assert_like_plain(dense[str(mix)], request, done["r"], seen)


@pytest.mark.parametrize("seed", range(3))
def test_mixes_of_all_ranks_and_sites_share_a_batch_of_64(
    seed: int, folders: dict[str, Path], dense: Mapping[str, nn.Module]
):
    """Samples of one request, tight memory and pieces of prompts included."""
    draw = random.Random(seed)
    requests = []
    for i in range(64):
        prompt, mix, tokens = random_prompt(draw), MIXES[i % len(MIXES)], draw.randint(2, 7)
        fields = {"id": f"r{i}", "tenant": f"t{i % 5}"}
        if i % 4:
            requests.append(greedy(prompt, mix, tokens, **fields))
        else:
            requests.append(sampled(prompt, mix, tokens, n=draw.randint(1, 3), seed=i, **fields))
    tight = draw.choice([20_000, 30_000])
    with build_engine(kv_memory=tight, max_chunk=draw.choice([4, 512])) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record_samples(engine)
        done = run_all(engine, shuffled(draw, requests))
        assert engine.scheduler.stats().num_preemptions > 0, "memory was not tight"
        assert_idle(engine)
    for request in requests:
        assert len(done[str(request.id)]) == request.params.n
        assert_like_plain(dense[str(request.adapter)], request, done[str(request.id)], seen)


def test_sample_j_of_n_is_the_answer_to_seed_plus_j(folders: dict[str, Path]):
    prompt = random_prompt(random.Random(1), 11, 11)
    mix = {"a": 0.7, "b": 0.3}
    many = sampled(prompt, mix, 8, seed=40, n=4, id="many")
    singles = [sampled(prompt, mix, 8, seed=40 + j, id=f"s{j}") for j in range(4)]
    answers = []
    for requests in ([many], singles):
        with build_engine() as engine:
            for name in mix:
                engine.add_adapter(name, folders[name])
            done = run_all(engine, requests)
            answers.append([c.token_ids for r in requests for c in done[str(r.id)]])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 4


def test_samples_share_the_blocks_of_their_prompt_and_run_it_once(folders: dict[str, Path]):
    prompt = random_prompt(random.Random(1), 41, 41)
    with build_engine(prefix_cache=False) as engine:
        engine.add_adapter("a", folders["a"])
        used = []
        requests = [sampled(prompt, "a", 3, n=4, id="r")]
        run_all(
            engine, requests, lambda: used.append(engine.blocks.num_blocks - engine.blocks.num_free)
        )
    # 41 tokens fill 10 blocks of 4 and begin an 11th, of which every sample has its own.
    assert max(used) == 10 + 4
    assert sum(engine.scheduler.stats().served.values()) == 41 + 3 * 1 + 4 * 2


def test_a_mix_names_contents_and_weights_in_what_answered(folders: dict[str, Path]):
    with build_engine() as engine:
        for name in ("a", "b"):
            engine.add_adapter(name, folders[name])
        done = run_all(
            engine,
            [greedy([5, 6], {"a": 0.7, "b": 0.3}, 1, id="mix"), greedy([5, 6], "b", 1, id="b")],
        )
    (name, digest, weight), (other, other_digest, other_weight) = done["mix"][0].answered.parts
    assert (name, weight, other, other_weight) == ("a", 0.7, "b", 0.3)
    assert done["b"][0].answered.parts == (("b", other_digest, 1.0),) and digest != other_digest


@pytest.mark.skipif(
    not cpu.available(), reason="rows are independent to the bit in the kernel only"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_steps_of_few_rows_no_bit_depends_on_the_neighbours(dtype: torch.dtype, tmp_path: Path):
    # Torch rounds silu and cos otherwise in the last few numbers of a tensor than before them. A row as wide as its
    # vectors has no such last few, nor have the rows of real models.
    def build() -> nn.Module:
        return build_pico("llama", dtype=dtype, intermediate_size=64, head_dim=32)

    folders = {
        name: write_peft(tmp_path / name, seed=seed, base=build(), **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    draw = random.Random(6)
    requests = [
        greedy(random_prompt(draw, 1, 1), mix, 6, id=f"{mix} {i}")
        for mix in MIXES
        for i in range(2)
    ]
    rows = []
    for batches in ([[request] for request in requests], [requests]):
        options = {"max_batch": 8, "max_step_tokens": pool.FEW_ROWS, "prefix_cache": False}
        with build_engine(model=build(), **options) as engine:
            for name, folder in folders.items():
                engine.add_adapter(name, folder)
            rows.append(record_samples(engine))
            for batch in batches:
                run_all(engine, batch)
    alone, together = rows
    assert alone.keys() == together.keys()
    assert [key for key, row in alone.items() if not torch.equal(row, together[key])] == []
