"""Two processes train what one would: losses of every step, adapters at the end, commands, states and failures.

All runs are forks of one child (`processes.py`); the tests read what they left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TOLERANCE = 1e-11  # of float64: sums in another order, over 20 steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked processes")
    folder = tmp_path_factory.mktemp("runs")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, str(HERE / "processes.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def seen(runs: Path, name: str, rank: int = 0) -> dict[str, Any]:
    folder = runs / name
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    return dict(json.loads((folder / f"{rank}.json").read_text()))


def adapters(runs: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(runs / name / f"{rank}.safetensors")


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=TOLERANCE, msg=key)


@pytest.mark.parametrize("how", ["turns", "rows", "together"])
def test_two_processes_train_what_one_trains(runs: Path, how: str) -> None:
    one, two = seen(runs, f"{how}-1"), seen(runs, f"{how}-2")
    assert one["losses"].keys() == two["losses"].keys()
    for name, losses in one["losses"].items():
        assert len(losses) in (8, 20) or name == "dora"
        # Losses are added up in fp32.
        assert two["losses"][name] == pytest.approx(losses, rel=1e-6), name
        assert two["norms"][name] == pytest.approx(one["norms"][name], rel=1e-6), name
    assert_close(adapters(runs, f"{how}-1"), adapters(runs, f"{how}-2"))


@pytest.mark.parametrize("how", ["turns", "rows", "together"])
def test_all_processes_end_with_the_same_bits(runs: Path, how: str) -> None:
    first, second = adapters(runs, f"{how}-2"), adapters(runs, f"{how}-2", 1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    told = [seen(runs, f"{how}-2", rank)["results"] for rank in (0, 1)]
    clocks = ("seconds", "tokens_per_second")
    plain = [[{k: v for k, v in row.items() if k not in clocks} for row in rows] for rows in told]
    assert plain[0] == plain[1]
    assert plain[0] == [
        {k: v for k, v in row.items() if k not in clocks}
        | {k: pytest.approx(row[k], rel=1e-6) for k in ("train_loss", "val_loss") if row[k]}
        for row in seen(runs, f"{how}-1")["results"]
    ]


@pytest.mark.parametrize("how", ["Trainer", "JointTrainer"])
def test_over_a_base_in_pieces_processes_train_the_same(runs: Path, how: str) -> None:
    one, two = seen(runs, f"pieces-1/{how}"), seen(runs, f"pieces-2/{how}")
    for name in ("lora", "mixlora"):
        assert two["losses"][name] == pytest.approx(one["losses"][name], rel=1e-6)
        assert len(one["losses"][name]) == 6
    # With a folder, jobs that have ended together are taken off; what they wrote is there.
    ours, theirs = (runs / f"pieces-{size}" / how / "out" for size in (1, 2))
    found = sorted(ours.glob("*/adapter/**/*.safetensors"))
    assert len(found) >= 3
    for path in found:
        assert_close(load_file(path), load_file(theirs / path.relative_to(ours)))
    notes = [
        json.loads((out / "lora" / "adapter" / "loramux.json").read_text())
        for out in (ours, theirs)
    ]
    assert notes[0] == notes[1]


def test_commands_and_failures_of_one_process_are_those_of_all(runs: Path) -> None:
    for rank in (0, 1):
        results = {row["name"]: row for row in seen(runs, "together-2", rank)["results"]}
        assert results["milora"]["status"] == "finished"  # added while the run went on
        assert results["dora"]["status"] == "failed"
        assert "token id 500 is outside the base's vocabulary" in results["dora"]["reason"]


@pytest.mark.parametrize("how", ["grown", "shrunk"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, how: str) -> None:
    stopped = {row["name"]: row for row in seen(runs, f"{how}-0")["results"]}
    assert {row["status"] for row in stopped.values()} <= {"running", "failed"}
    ended = {row["name"]: row for row in seen(runs, f"{how}-1")["results"]}
    # One of two processes was asked: the other hears of it with the next round.
    assert stopped["lora"]["steps"] == {"grown": 6, "shrunk": 7}[how]
    assert ended["lora"]["steps"] == 20
    want, have = runs / "out-unbroken", runs / f"out-{how}"
    found = sorted(want.glob("*/adapter/**/*.safetensors"))
    assert len(found) >= 3
    for path in found:
        assert_close(load_file(path), load_file(have / path.relative_to(want)))
    histories = [json.loads((f / "lora" / "history.json").read_text()) for f in (want, have)]
    assert [row["step"] for row in histories[0]] == [row["step"] for row in histories[1]]


def test_a_process_that_dies_ends_the_run_with_a_clear_error(runs: Path) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    assert codes["dying"] == [1, 9]
    told = (runs / "dying" / "0.error").read_text()
    assert told.startswith("ParallelError: another of the 2 processes has ended, or let process 0")
    assert "the same command goes on from the last state" in told


def test_processes_that_hold_other_weights_are_refused_before_the_first_step(runs: Path) -> None:
    for rank in (0, 1):
        told = (runs / "unlike" / f"{rank}.error").read_text()
        assert "hold other weights of ['lora']" in told
