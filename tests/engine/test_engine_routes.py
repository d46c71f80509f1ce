"""Routers that read the prompt run once per request: in one piece, whatever preempts it, for all of its samples."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from conformance.cases import Maker, every_variant
from engine.crowd import (
    assert_close,
    build_engine,
    dense_logits,
    greedy,
    random_prompt,
    save_variants,
)
from engine.helpers import (
    assert_idle,
    record_plans,
    record_samples,
    run_all,
    sampled,
)
from loramux.engine import latecalls, wiring
from loramux.engine.program import Entry
from pico import build_pico

PROMPTED = ["milora-ste", "milora-prob-last", "milora-renorm-max", "milora-dora", "mole-prompt"]
Asked = Counter[tuple[str, int]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    chosen = [v for v in every_variant() if v.name in PROMPTED]
    root = tmp_path_factory.mktemp("prompted")
    return save_variants(Maker(root / "experts"), root, chosen, "llama")


@pytest.fixture(scope="module")
def core(folders: dict[str, Path]) -> loramux.Handle:
    (first, folder), *others = folders.items()
    handle = loramux.load(build_pico("llama"), folder, name=first, backend="reference")
    for name, path in others:
        handle.load(path, name=name)
    return handle


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """How often each router was run for each request, by (request, router)."""
    counts: Asked = Counter()
    original = wiring.ask_router

    def counted(entry: Entry, router: Any, x: torch.Tensor) -> Any:
        counts[entry.sample.request_id, id(router)] += 1
        return original(entry, router, x)

    monkeypatch.setattr(wiring, "ask_router", counted)
    monkeypatch.setattr(latecalls, "ask_router", counted)
    return counts


def assert_like_core(core: loramux.Handle, requests: list[Any], done: Any, seen: Any) -> None:
    for request in requests:
        prompt = list(request.prompt)
        for sample in done[request.id]:
            assert sample.error is None, sample.error
            text = [*prompt, *sample.token_ids]
            rows = dense_logits(core, request.adapter, text, len(prompt))
            for place in range(len(sample.token_ids)):
                got = seen[request.id, sample.index, len(prompt) + place]
                assert_close(got, rows[place], (request.adapter, request.id, sample.index, place))


def test_a_preempted_request_keeps_what_its_prompt_decided(
    folders: dict[str, Path], core: loramux.Handle, asked: Asked
):
    draw = random.Random(0)
    requests = [
        greedy(random_prompt(draw, 8, 20), PROMPTED[i % 5], 12, id=f"r{i}") for i in range(20)
    ]
    with build_engine(kv_memory=30_000) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record_samples(engine)
        done = run_all(engine, requests)
        assert_idle(engine)
    preempted = [r.id for r in requests if done[str(r.id)][0].preemptions]
    assert len(preempted) >= 3, "hardly anything was preempted"
    assert {request for request, _ in asked} == {request.id for request in requests}
    assert set(asked.values()) == {1}
    assert_like_core(core, requests, done, seen)


def test_the_samples_of_a_request_share_one_decision(
    folders: dict[str, Path], core: loramux.Handle, asked: Asked
):
    draw = random.Random(1)
    requests = [
        sampled(random_prompt(draw, 9, 18), name, 6, n=4, seed=3, id=name) for name in PROMPTED
    ]
    with build_engine(kv_memory=40_000) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        seen = record_samples(engine)
        done = run_all(engine, requests)
        assert_idle(engine)
    assert asked and set(asked.values()) == {1}
    assert all(len({sample.token_ids for sample in done[name]}) > 1 for name in PROMPTED)
    assert_like_core(core, requests, done, seen)


def test_a_prompt_that_decides_runs_in_one_piece_however_long(folders: dict[str, Path]):
    draw = random.Random(2)
    long, short = random_prompt(draw, 90, 90), random_prompt(draw, 30, 30)
    with build_engine(max_chunk=4, max_step_tokens=64) as engine:
        engine.add_adapter("m", folders["milora-ste"])
        plans = record_plans(engine)
        run_all(
            engine,
            [
                greedy(long, "m", 3, id="long"),
                greedy(short, "m", 3, id="short"),
                greedy(long, None, 3, id="base"),
            ],
        )
    pieces = {
        request: [(start, count) for plan in plans for r, start, count in plan if r == request]
        for request in ("long", "short", "base")
    }
    assert pieces["long"] == [(0, 90), (90, 1), (91, 1)]
    assert pieces["short"] == [(0, 30), (30, 1), (31, 1)]
    assert max(count for _, count in pieces["base"]) == 4


def test_no_prompt_finds_the_keys_of_one_that_was_routed(folders: dict[str, Path]):
    """Not even the same prompt again: its beginning was computed under gates that its end decided."""
    prompt = random_prompt(random.Random(3), 40, 40)
    with build_engine() as engine:
        engine.add_adapter("m", folders["milora-ste"])
        engine.add_adapter("n", folders["milora-renorm-max"])
        for i, adapter in enumerate(["m", "m", {"m": 0.5}, {"m": 0.5}, "n", None, None, "m"]):
            done = run_all(engine, [greedy(prompt, adapter, 2, id=f"r{i}")])
            assert done[f"r{i}"][0].cached_tokens == (36 if i == 6 else 0), (i, adapter)


def test_a_weight_scales_what_the_prompt_decided(folders: dict[str, Path], tmp_path: Path):
    """{name: w} is the adapter with its B rows times w: gates do not depend on B at the first layer alone, so this
    holds where only the first layer has rows."""
    config = loramux.MiLoRAConfig(r=4, top_k=2, lora_dropout=0.0, layers_to_transform=(0,))
    saved = []
    for factor in (1.0, 0.5):
        torch.manual_seed(0)
        handle = loramux.attach(build_pico("llama"), config)
        with torch.no_grad():
            for rows in handle.adapters["default"].rows.values():
                rows.b.copy_(factor * torch.randn_like(rows.b))
        saved.append(handle.save(tmp_path / str(factor)))
    prompt = random_prompt(random.Random(4), 12, 12)
    rows = []
    for adapter, folder in (({"m": 0.5}, saved[0]), ("m", saved[1]), ("m", saved[0])):
        with build_engine() as engine:
            engine.add_adapter("m", folder)
            seen = record_samples(engine)
            run_all(engine, [greedy(prompt, adapter, 1, id="r")])
            rows.append(seen["r", 0, 12])
    assert_close(rows[0], rows[1], "half")
    assert float((rows[0] - rows[2]).abs().max()) > 0.01
