"""Jobs that cannot be trained, and copies that cannot be made, cost the run nothing; what it waits for comes back."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from joint.jobs import attached, job, tiny
from joint.recipes import JOBS, recipe, write_base
from joint.test_commands import Scripted, attached_to
from joint.test_resume import StopAfter
from loramux.errors import RecipeError
from loramux.recipe import DpoConfig
from loramux.train import train_recipe
from loramux.train.joint import Command, JointTrainer
from loramux.train.joint.run import Copies
from train.toys import pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("late"))


@pytest.mark.parametrize("fault", ["reference", "packing", "code"])
def test_a_late_job_that_has_no_runner_is_refused_unwritten_and_its_name_stays_free(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny()
    handle = attached(made, ["lora"])
    wrong = {
        "reference": {"train": pairs(4), "objective": DpoConfig(name="dpo", reference="gone")},
        "packing": {"packing": True},
        "code": {"train": [None]},
    }[fault]

    def refuse(*_: Any) -> None:
        raise ValueError("rows would see each other")

    monkeypatch.setattr("loramux.train.joint.trainer.check_packing", refuse)

    def load(value: Any) -> Any:
        attached_to(handle, "milora")
        return job("milora", steps=2, **(wrong if value == "wrong" else {}))

    late = [Command("add", "milora", "wrong"), Command("add", "milora", "right")]
    inbox = Scripted({2: late[:1], 3: late[1:]})
    out = tmp_path / "run"
    run = JointTrainer(made, handle, [job("lora", steps=4)], out=out, inbox=inbox, load=load)
    results = run.run()
    assert [(result.name, result.status) for result in results] == [
        ("lora", "finished"),
        ("milora", "finished"),
    ]
    told = {"reference": "no adapter named 'gone'", "packing": "would see", "code": "Error: "}
    assert told[fault] in inbox.answers[0][1]
    assert inbox.answers[1][1] == ""
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert [(line["round"], line["value"]) for line in lines] == [(3, "right")]


def test_a_copy_never_takes_the_place_of_what_is_no_adapter(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    jobs = [JOBS[0], {**JOBS[1], "out": str(theirs)}]
    with pytest.raises(RecipeError, match="is there and is no adapter"):
        train_recipe(recipe(base, jobs=jobs), tmp_path / "run", progress=False, board=False)
    twice = [{**each, "out": str(tmp_path / "one")} for each in JOBS]
    with pytest.raises(RecipeError, match="for both"):
        Copies(recipe(base, jobs=twice).jobs_resolved())
    # One that arrives late is refused; one whose folder was filled meanwhile keeps its adapter in the run alone.
    (tmp_path / "run" / "queue").mkdir(parents=True)
    late = {**JOBS[1], "name": "late", "out": str(theirs)}
    (tmp_path / "run" / "queue" / "late.yaml").write_text(yaml.safe_dump(late))
    filled = tmp_path / "filled"
    jobs = [JOBS[0], {**JOBS[1], "out": str(filled)}]

    class Fill(StopAfter):
        def stepped(self, trainer: Any, event: Any) -> None:
            filled.mkdir(exist_ok=True)
            (filled / "notes.txt").write_text("mine")

    with caplog.at_level(logging.WARNING):
        result = train_recipe(
            recipe(base, jobs=jobs),
            tmp_path / "run",
            progress=False,
            board=False,
            callbacks=[Fill(0)],
        )
    assert [each["status"] for each in result["jobs"]] == ["finished"] * 2
    assert "is no adapter" in (tmp_path / "run" / "queue" / "refused" / "late.txt").read_text()
    assert any("is in" in r.message and "alone" in r.message for r in caplog.records)
    assert [p.name for p in filled.iterdir()] == ["notes.txt"]
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"]


def test_a_resumed_run_under_a_limit_admits_and_predicts_as_the_unbroken_one(
    tmp_path: Path,
) -> None:
    names, double = ["lora", "milora"], torch.float64

    def made(out: Path, limit: Any, *listeners: Any) -> JointTrainer:
        model = tiny(dtype=double)
        handle = attached(model, names, double)
        jobs = [job(name, steps=3, gradient_accumulation_steps=1) for name in names]
        return JointTrainer(
            model, handle, jobs, out=out, resume=True, memory=limit, listeners=listeners
        )

    unbroken = made(tmp_path / "unbroken", "measured")
    unbroken.run()
    stopped = made(tmp_path / "broken", "measured", StopAfter(2))
    stopped.run()
    again = made(tmp_path / "broken", "measured")
    assert stopped.guard is not None
    assert again.guard is not None
    assert again.guard.largest == stopped.guard.largest
    again.run()
    assert unbroken.guard is not None
    assert again.guard.state() == unbroken.guard.state()


def test_a_job_that_waits_for_memory_still_waits_when_the_run_goes_on(tmp_path: Path) -> None:
    def made(*listeners: Any) -> JointTrainer:
        model = tiny()
        handle = attached(model, ["milora", "lora"])
        jobs = [job("milora", steps=6), job("lora", steps=2)]
        return JointTrainer(
            model, handle, jobs, out=tmp_path / "run", resume=True, listeners=listeners
        )

    stopped = made(StopAfter(3))
    assert [result.status for result in stopped.run()] == ["running", "finished"]
    stopped.entries["milora"].is_held = True
    stopped.checkpoint()
    assert made().entries["milora"].is_held
