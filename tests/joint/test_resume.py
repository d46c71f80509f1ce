"""A joint run that was killed ends with the bits of an unbroken one, for every job, wherever it was killed.

LORAMUX_KILL_POINTS=20 tries so many random points instead of the three that are always tried.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from joint.jobs import attached, job, tiny
from loramux.train import CheckpointError, Listener, StepEvent, Trainer
from loramux.train.joint import JointTrainer

HERE = Path(__file__).parent
POINTS = os.environ.get("LORAMUX_KILL_POINTS", "")


def contents(folder: Path) -> dict[str, bytes]:
    """Adapters, histories, and the last state but for the clock."""
    kept = [*folder.rglob("history.json"), *folder.rglob("edits.json"), folder / "journal.jsonl"]
    kept += [p for name in ("adapter", "best") for p in folder.glob(f"*/{name}/**/*.safetensors")]
    last = max(p for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    kept += last.glob("*.safetensors")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(kept) if p.exists()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [
        sys.executable,
        str(HERE / "killed.py"),
        str(tmp_path),
        *([POINTS] if POINTS else []),
    ]
    subprocess.run(command, env=env, check=True)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.pop("unbroken") == [0]
    assert len(status) == int(POINTS or 3)
    want = contents(tmp_path / "unbroken")
    assert {
        f"{name}/history.json" for name in ("lora", "mixlora", "smora", "milora")
    } <= want.keys()
    assert len([name for name in want if name.endswith("adapter_model.safetensors")]) > 4
    for name, codes in status.items():
        assert codes == [-9, 0], f"{name}: killed, then ended well, was expected"
        have = contents(tmp_path / name)
        assert have.keys() == want.keys(), name
        assert not [key for key in want if have[key] != want[key]], name


class StopAfter(Listener):
    def __init__(self, number: int):
        self.number = number

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if trainer.round == self.number:
            trainer.stop()


def two(out: Path, *listeners: Listener, resume: bool = True, **changes: Any) -> JointTrainer:
    base = tiny()
    handle = attached(base, ["lora", "mixlora"])
    jobs = [job("lora", steps=3), job("mixlora", steps=8, **changes)]
    return JointTrainer(base, handle, jobs, out=out, resume=resume, listeners=listeners)


def test_a_stopped_run_goes_on_with_the_jobs_that_had_not_ended(tmp_path: Path) -> None:
    two(tmp_path / "unbroken").run()
    statuses = [result.status for result in two(tmp_path / "broken", StopAfter(5)).run()]
    assert statuses == ["finished", "running"]
    again = two(tmp_path / "broken")
    assert list(again.handle.adapters) == ["mixlora"]
    results = again.run()
    assert [(result.name, result.status, result.steps) for result in results] == [
        ("lora", "finished", 3),
        ("mixlora", "finished", 8),
    ]
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    assert [result.steps for result in two(tmp_path / "broken").run()] == [3, 8]


def test_ended_jobs_leave_no_tensors_in_the_states(tmp_path: Path) -> None:
    two(tmp_path, StopAfter(5)).run()
    names = {
        p.name.split(".")[0] for p in (tmp_path / "checkpoints" / "00000005").glob("*.safetensors")
    }
    assert names == {"1"}


def test_another_job_of_the_same_name_is_refused_with_what_differs(tmp_path: Path) -> None:
    two(tmp_path, StopAfter(2)).run()
    with pytest.raises(
        CheckpointError, match=r"jobs\.mixlora\.training\.learning_rate: 0\.01 there"
    ):
        two(tmp_path, learning_rate=2e-2)


def test_states_are_not_overwritten_without_resume(tmp_path: Path) -> None:
    two(tmp_path, StopAfter(2)).run()
    with pytest.raises(CheckpointError, match="earlier run"):
        two(tmp_path, resume=False)
