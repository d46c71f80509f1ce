"""Routers of single linears in the engine: alone, in crowds, in FFN blocks that others route by rows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import loramux
from conformance.cases import Maker, variants_of
from core.gated import Gated, adapter
from engine.crowd import (
    assert_like_core,
    build_engine,
    drive,
    greedy,
    load_all,
    random_prompt,
    record,
    save_variants,
)
from pico import build_pico

KINDS = {
    "equal": {"ranks": (3, 3, 3)},
    "uneven": {"ranks": (2, 0, 4), "sparse": True},
    "ranks": {"ranks": (1,) * 6},
    "tied": {"ranks": (3, 3), "tied": True},
    "gated-rows": {"ranks": (2, 3), "factor": True},
}


@pytest.mark.parametrize("seed", range(3))
def test_routers_of_linears_answer_as_the_core_does_in_any_crowd(seed: int, tmp_path: Path):
    make = Maker(tmp_path / "experts")
    folders = save_variants(make, tmp_path, variants_of("lora", "mixlora", "mole"), "llama")
    handle = load_all(build_pico("llama"), folders)
    for number, (name, kind) in enumerate(KINDS.items()):
        handle.put(adapter(handle, Gated(**kind), name, seed=number))
    draw = random.Random(seed)
    names = [None, *folders, *KINDS, *KINDS]
    requests = [
        greedy(random_prompt(draw), draw.choice(names), draw.randint(1, 6), id=f"r{i}")
        for i in range(40)
    ]
    with build_engine(max_chunk=draw.choice([3, 64]), kv_memory="200KiB") as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        for name in KINDS:
            engine.add_adapter(name, handle.adapters[name])
        seen = record(engine)
        done = drive(engine, requests, draw)
    assert_like_core(handle, requests, done, seen)


def test_a_linear_with_fewer_experts_than_others_gets_weights_for_its_own():
    model = build_pico("llama")
    handle = loramux.attach(model, loramux.LoraConfig())
    made = adapter(handle, Gated((2, 2, 2)))
    fewer = adapter(handle, Gated((2, 2)), seed=1)
    path = "model.layers.1.mlp.down_proj"
    made.rows[path], made.routers[path] = fewer.rows[path], fewer.routers[path]
    made.rows_by_key[path.replace(".", "/")] = fewer.rows[path]
    made.routers_by_key[path.replace(".", "/")] = fewer.routers[path]
    handle.put(made)
    request = greedy(random_prompt(random.Random(0)), "gated", 3, id="a")
    with build_engine() as engine:
        engine.add_adapter("gated", made)
        seen = record(engine)
        done = drive(engine, [request], random.Random(0))
    assert_like_core(handle, [request], done, seen)


def test_gates_of_a_layer_are_read_anew_in_blocks_that_others_route_by_rows(tmp_path: Path):
    """Decode steps reuse their rows: a neighbour whose gate sits at the layer must not get the last step's weights."""
    make = Maker(tmp_path / "experts")
    folders = save_variants(make, tmp_path, variants_of("mixlora", "loraflow"), "llama")
    handle = load_all(build_pico("llama"), folders)
    draw = random.Random(5)
    requests = [greedy(random_prompt(draw), name, 24, id=f"r{i}") for i, name in enumerate(folders)]
    with build_engine() as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record(engine)
        answers = engine.generate(requests)  # all at once: the same batch decodes for many steps
        done = {str(r.id): answer[0] for r, answer in zip(requests, answers, strict=True)}
    assert_like_core(handle, requests, done, seen)
