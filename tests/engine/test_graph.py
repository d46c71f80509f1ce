"""Captured decode steps answer as steps that are not, whatever shares them.

Why a process of its own: Triton decides at import whether it compiles or interprets. There a tape stands in for the
graph (engine/tape.py); on a GPU the graph is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.crowd import build_engine, greedy
from loramux.engine import graph
from loramux.engine.graph import Size, why_not_captured
from pico import build_pico

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


CHECKS = {
    "llama": "check_answers('cpu', 'llama', STATIC, count=5)",
    "windows": "check_answers('cpu', 'gemma3', STATIC[:2], count=3, with_eager=False)",
    "small": "check_small('cpu')",
}
CHILD = """
import json, sys, traceback
import torch
torch.set_num_threads(1)
from engine.graph_checks import *
found = {}
for name, call in json.loads(sys.argv[1]).items():
    try:
        exec(call)
        found[name] = ""
    except Exception:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """Of each check what went wrong, or nothing; one child for all, for its imports take seconds."""
    pytest.importorskip("triton")
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    own = {"TRITON_INTERPRET": "1", "LORAMUX_NO_CC": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(CHECKS)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CHECKS.keys()
    return found


def test_captured_steps_equal_the_core_and_steps_that_are_not_captured(
    failures: dict[str, str],
) -> None:
    assert not failures["llama"], failures["llama"]


def test_captured_steps_equal_the_core_where_layers_have_windows(failures: dict[str, str]) -> None:
    assert not failures["windows"], failures["windows"]


def test_what_changes_between_steps_is_seen_and_what_cannot_be_captured_is_not_taken(
    failures: dict[str, str],
) -> None:
    assert not failures["small"], failures["small"]


@pytest.mark.gpu
@NEEDS_GPU
def test_real_graphs_equal_the_core_and_steps_that_are_not_captured() -> None:
    from engine import graph_checks

    graph_checks.check_answers("cuda", "llama", graph_checks.STATIC, count=9)
    graph_checks.check_answers("cuda", "gemma3", graph_checks.STATIC[:2], count=6)
    graph_checks.check_small("cuda")


def test_on_a_cpu_nothing_is_captured_and_stats_say_why() -> None:
    engine = build_engine()
    list(engine.stream(greedy([5, 6, 7], tokens=3)))
    assert engine.stats()["graphs"] == {"captured": 0, "replayed": 0, "off": "the model is on cpu"}
    assert engine._parts.runner.graphs is None
    engine.close()
    with build_engine(cuda_graphs=False) as engine:
        assert engine.stats()["graphs"]["off"] == "cuda_graphs is off"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_local_experts": 4}, "mixture of experts"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "longest sequence"),
    ],
)
def test_models_whose_step_may_wait_for_the_host_are_not_captured(
    change: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "is_interpreted", lambda: True)
    monkeypatch.setattr(graph, "why_not", lambda *_, **__: "")
    model = build_pico("llama")
    with build_engine(model=model) as engine:
        wiring = engine._parts.runner.wiring
        assert why_not_captured(model, wiring) == ""
        for name, value in change.items():
            monkeypatch.setattr(model.config, name, value, raising=False)
        assert reason in why_not_captured(model, wiring)


@pytest.mark.parametrize(
    ("rows", "pairs", "size"),
    [(1, 0, (1, 0)), (1, 1, (1, 1)), (5, 3, (8, 8)), (5, 20, (8, 32)), (64, 64, (64, 64))],
)
def test_a_step_is_padded_to_the_next_power_of_two(
    rows: int, pairs: int, size: tuple[int, int]
) -> None:
    class Counts:
        num_tokens, num_pairs = rows, pairs

    assert Size.of(Counts()) == Size(*size)  # type: ignore[arg-type]
