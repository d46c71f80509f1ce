"""A run that was stopped or killed ends with the bits of an unbroken one: weights, optimizer and history."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loramux
from loramux.train import CheckpointError, Job, Listener, StepEvent, Trainer, TrainingConfig
from pico import PAD, build_pico
from train.toys import examples

HERE = Path(__file__).parent


def contents(folder: Path) -> dict[str, bytes]:
    """The results and the last state of a run, file by file."""
    last = max(p for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    kept = [*last.glob("*.safetensors"), *folder.rglob("history.json"), *folder.rglob("edits.json")]
    kept += [p for name in ("adapter", "best") for p in folder.glob(f"**/{name}/**/*.safetensors")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(kept)}


KINDS = ("mixlora", "beamlora", "moving")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per kind; one child does all, for its imports cost more than the runs of a kind."""
    folder = tmp_path_factory.mktemp("killed")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    subprocess.run(
        [sys.executable, str(HERE / "killed_run.py"), str(folder), *KINDS], env=env, check=True
    )
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_like_an_unbroken_one_wherever_it_was_killed(
    kind: str, killed: Path
) -> None:
    folder = killed / kind
    status = json.loads((folder / "status.json").read_text())
    assert status.pop("unbroken") == [0]
    assert len(status) == 4
    want = contents(folder / "unbroken")
    assert "history.json" in want
    if kind == "mixlora":
        assert any(name.endswith("router.safetensors") for name in want)
    else:
        assert len({row["step"] for row in json.loads(want["edits.json"])}) > 2
    for name, codes in status.items():
        assert codes == [-9, 0], f"{name}: killed, then ended well, was expected"
        assert contents(folder / name) == want, name


class StopAt(Listener):
    def __init__(self, step: int):
        self.step = step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            trainer.stop()


def two_jobs(out: Path, *listeners: Listener, lr: float = 1e-2, resume: bool = True) -> Trainer:
    base = build_pico("llama")
    torch.manual_seed(0)
    handle = loramux.attach(base, loramux.LoraConfig(r=4, lora_dropout=0.1), name="one")
    handle.add(loramux.MiLoRAConfig(r=4), name="two")
    jobs = [
        Job(
            name,
            train=examples(30, seed=seed),
            validation=examples(6, seed=9),
            training=TrainingConfig(
                steps=steps, learning_rate=lr, micro_batch_size=4, eval_every=4, log_every=3
            ),
            seed=seed,
            pad_token_id=PAD,
        )
        for name, steps, seed in (("one", 6, 1), ("two", 11, 2))
    ]
    return Trainer(base, handle, jobs, out=out, resume=resume, listeners=listeners)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_stopped_jobs_go_on_where_each_of_them_stood(step: int, tmp_path: Path) -> None:
    two_jobs(tmp_path / "unbroken").run()
    states = [result.status for result in two_jobs(tmp_path / "broken", StopAt(step)).run()]
    assert "running" in states
    results = two_jobs(tmp_path / "broken").run()
    assert [result.status for result in results] == ["finished", "finished"]
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_a_complete_run_is_not_trained_again(tmp_path: Path) -> None:
    two_jobs(tmp_path).run()
    before = contents(tmp_path)
    results = two_jobs(tmp_path, StopAt(0)).run()
    assert [result.steps for result in results] == [6, 11]
    assert contents(tmp_path) == before


def test_a_truncated_state_costs_steps_but_not_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_jobs(tmp_path / "unbroken").run()
    two_jobs(tmp_path / "broken", StopAt(4)).run()
    two_jobs(tmp_path / "broken", StopAt(8)).run()
    victim = tmp_path / "broken" / "checkpoints" / "00000008" / "1.optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:100])
    two_jobs(tmp_path / "broken").run()
    assert "falling back" in caplog.text
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    two_jobs(tmp_path, StopAt(2)).run()
    with pytest.raises(CheckpointError, match=r"jobs\.one\.training\.learning_rate: 0\.01 there"):
        two_jobs(tmp_path, lr=2e-2)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_other_tasks_of_the_same_rows_are_other_data(part: str) -> None:
    rows = examples(4)
    training = TrainingConfig(steps=1)

    def identity(tasks: list[str]) -> object:
        named = [replace(row, task=task) for row, task in zip(rows, tasks, strict=True)]
        data = {"train": rows, part: named}
        return Job("one", training=training, **data).identity()["data"]  # type: ignore[arg-type]

    before = identity(["asks", "tell", "asks", "tell"])
    assert before == identity(["asks", "tell", "asks", "tell"])
    assert before != identity(["tell", "asks", "asks", "tell"])


def test_states_are_not_overwritten_without_resume(tmp_path: Path) -> None:
    two_jobs(tmp_path, StopAt(2)).run()
    with pytest.raises(CheckpointError, match="earlier run"):
        two_jobs(tmp_path, resume=False)


def test_listeners_and_states_do_not_change_what_is_trained(tmp_path: Path) -> None:
    from loramux.train.board import TensorBoard
    from loramux.train.progress import PlainProgress

    two_jobs(tmp_path / "bare").run()
    watched = two_jobs(tmp_path / "watched", TensorBoard(tmp_path / "board"), PlainProgress())

    class Save(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            if event.job == "one":
                trainer.checkpoint()

    watched.listeners = (*watched.listeners, Save())
    watched.run()
    assert contents(tmp_path / "watched") == contents(tmp_path / "bare")
