"""Engines whose decode steps are captured, against plain forwards and against the same engine without graphs.

Run in a process that has Triton's interpreter, or on a GPU.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.cases import Maker, every_variant
from engine.crowd import (
    Logits,
    assert_close,
    assert_like_core,
    build_engine,
    drive,
    greedy,
    load_all,
    random_prompt,
    record,
    save_variants,
)
from engine.helpers import assert_idle
from engine.tape import CaptureRefused, Tape
from loramux.engine import graph
from loramux.engine.engine import Engine
from pico import build_pico

STATIC = ["lora-patterns", "lora-dora", "milora-ste"]
LATE = ["mixlora-top2", "mole-layer"]


def folders_of(root: Path, names: list[str], family: str = "llama") -> dict[str, Path]:
    chosen = [v for v in every_variant() if v.name in names]
    assert len(chosen) == len(names), [v.name for v in every_variant()]
    return save_variants(Maker(root / "experts"), root, chosen, family)


def engine_for(
    folders: dict[str, Path], device: str, family: str = "llama", **options: Any
) -> Engine:
    given = {"max_batch": 6, "fuse": False, "slot_memory": "1MiB", **options}
    engine = build_engine(family, build_pico(family).to(device), **given)
    graphs = engine._parts.runner.graphs
    if graphs is not None and device == "cpu":
        graphs.capture = Tape()
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


def crowd(names: list[Any], count: int, seed: int) -> list[Any]:
    draw = random.Random(seed)
    return [
        greedy(random_prompt(draw, 1, 9), names[i % len(names)], draw.randint(3, 5), id=str(i))
        for i in range(count)
    ]


def check_answers(
    device: str, family: str, names: list[str], count: int, with_eager: bool = True
) -> None:
    """Random arrivals, slots that change hands, mixes: logits as from the core, and as from steps not captured."""
    with tempfile.TemporaryDirectory() as root:
        folders = folders_of(Path(root), names, family)
        mix = {names[0]: 0.5, names[1]: 0.25}
        requests = crowd([None, *names, mix], count, seed=1)
        engine = engine_for(folders, device, family, max_slots=8)
        seen, done = answers(engine, requests, are_captured=True)
        if with_eager:
            other = engine_for(folders, device, family, max_slots=8, cuda_graphs=False)
            eager, plain = answers(other, requests, are_captured=False)
            assert seen.keys() == eager.keys()
            for key, row in seen.items():
                assert_close(row, eager[key], key)
            for request in requests:
                assert done[request.id].token_ids == plain[request.id].token_ids
        core = load_all(build_pico(family), folders)
        alone = [r for r in requests if not isinstance(r.adapter, dict)]
        assert_like_core(core, alone, done, seen)


def answers(engine: Engine, requests: list[Any], are_captured: bool) -> tuple[Logits, Any]:
    seen = record(engine)
    done = drive(engine, requests, random.Random(2))
    stats = engine.stats()["graphs"]
    assert (stats["replayed"] > 3) is are_captured, stats
    assert stats["captured"] < max(1, stats["replayed"]), stats
    assert_idle(engine)
    engine.close()
    return {key: row.cpu() for key, row in seen.items()}, done


def check_routed_steps_are_not_taken(device: str) -> None:
    """A router that still has to run makes the whole step an ordinary one; when it is gone steps are captured again."""
    with tempfile.TemporaryDirectory() as root:
        folders = folders_of(Path(root), [*LATE, "lora-patterns"])
        engine = engine_for(folders, device, max_slots=32)
        seen = record(engine)
        requests = crowd([*LATE, "lora-patterns"], 3, seed=3)
        graphs = engine._parts.runner.graphs
        assert graphs is not None
        for request in requests[:2]:
            done = drive(engine, [request], random.Random(0))
            assert graphs.replayed == 0
            on_cpu = {key: row.cpu() for key, row in seen.items()}
            assert_like_core(load_all(build_pico("llama"), folders), [request], done, on_cpu)
        drive(engine, requests[2:], random.Random(0))
        assert graphs.replayed > 0
        engine.close()


def check_a_replaced_adapter(device: str) -> None:
    """The same graph, replayed over slots that hold something else now, gives the new adapter's answer."""
    with tempfile.TemporaryDirectory() as root:
        folders = folders_of(Path(root), ["lora-patterns", "lora-dora"])
        first, second = folders.values()
        engine = engine_for({"mine": first}, device, max_slots=1)
        seen, requests = record(engine), crowd(["mine"], 2, seed=5)
        graphs = engine._parts.runner.graphs
        assert graphs is not None
        for folder, request in zip((first, second), requests, strict=True):
            engine.add_adapter("mine", folder)
            captured = graphs.captured
            done = drive(engine, [request], random.Random(0))
            core = load_all(build_pico("llama"), {"mine": folder})
            assert_like_core(core, [request], done, {k: v.cpu() for k, v in seen.items()})
        assert captured == graphs.captured == 1 and graphs.replayed > 4
        engine.close()


def check_a_newcomer(device: str) -> None:
    """Others' pairs in the same graph: a fourth request joins three, and the step is of four rows as before."""
    with tempfile.TemporaryDirectory() as root:
        folders = folders_of(Path(root), ["lora-patterns", "lora-dora"])
        first, second = folders
        draw = random.Random(4)
        requests = [
            greedy(random_prompt(draw, 2, 5), name, 7, id=str(i))
            for i, name in enumerate([first, first, first, second])
        ]
        engine = engine_for(folders, device, max_slots=8)
        seen, graphs = record(engine), engine._parts.runner.graphs
        assert graphs is not None
        for request in requests[:3]:
            engine.add_request(request)
        while graphs.replayed < 2:
            engine.step()
        done = drive(engine, requests[3:], random.Random(0))
        assert max(size.rows for size in graphs._steps) == 4
        while engine.has_work():
            engine.step()
        for request in requests[:3]:
            (done[str(request.id)],) = engine.completion(str(request.id)) or ()
        core = load_all(build_pico("llama"), folders)
        assert_like_core(core, requests, done, {k: v.cpu() for k, v in seen.items()})
        engine.close()


def check_the_longest_unused_graph_goes(device: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "MAX_GRAPHS", 1)
        engine = engine_for({}, device)
        drive(engine, crowd([None], 5, seed=7), random.Random(1))
        graphs = engine._parts.runner.graphs
        assert graphs is not None and len(graphs._steps) == 1
        assert graphs.captured >= 2
        engine.close()
        assert engine._parts.runner.graphs is None


def check_spare_rows_write_nothing(device: str) -> None:
    """Only the places of the sequences' own new tokens change in the pool, block 0 included."""
    engine = engine_for({}, device)
    runner, pool = engine._parts.runner, engine._parts.kv
    for tensor in (*pool.keys_LBGDTP, *pool.values_LBGTDP):
        tensor.fill_(torch.nan)
    run, size, checked = runner.run, pool.block_size, 0

    def watched(plan: Any) -> Any:
        nonlocal checked
        before = pool.keys_LBGDTP[0].nan_to_num(nan=1e9)
        got = run(plan)
        if all(chunk.count == 1 for chunk in plan.chunks):
            after = pool.keys_LBGDTP[0].nan_to_num(nan=1e9)
            changed = (before != after).any(4).any(2).any(1).nonzero().tolist()
            own = [[c.sequence.blocks[c.start // size], c.start % size] for c in plan.chunks]
            assert sorted(changed) == sorted(own)
            checked += len(own) == 3
        return got

    runner.run = watched  # type: ignore[method-assign]
    for prompt in ([5, 6, 7], [8, 9], [10, 11, 12, 13]):
        engine.add_request(greedy(prompt, tokens=4))
    while engine.has_work():
        engine.step()
    assert checked > 1
    engine.close()


class Peeks(nn.Module):
    """A norm that looks at a number on the host."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if float(x.abs().max()) < 1e6 else x


def check_a_step_that_waits_for_the_host_is_refused() -> None:
    model = build_pico("llama")
    model.model.norm = Peeks(model.model.norm)
    engine = build_engine(model=model, fuse=False, slot_memory="1MiB")
    graphs = engine._parts.runner.graphs
    assert graphs is not None
    graphs.capture = Tape()
    engine.add_request(greedy([5, 6, 7], tokens=4))
    engine.step()
    with pytest.raises(CaptureRefused, match="item within a captured step"):
        engine.step()
    engine.check_integrity()
    engine.close()


def check_small(device: str) -> None:
    check_routed_steps_are_not_taken(device)
    check_a_replaced_adapter(device)
    check_the_longest_unused_graph_goes(device)
    check_spare_rows_write_nothing(device)
    check_a_newcomer(device)
    if device == "cpu":
        check_a_step_that_waits_for_the_host_is_refused()
