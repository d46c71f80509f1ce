"""The queue folder: whatever lies in it, the run goes on, and whoever put it there reads what became of it."""

import os
from pathlib import Path
from typing import Any

import pytest

from loramux.recipe import JobRecipe, parse_recipe
from loramux.recipe.load import load_job
from loramux.train.joint import Command
from loramux.train.joint.queue import QueueFolder, waiting_files

RECIPE = parse_recipe(
    {
        "base": "some/model",
        "method": {"name": "lora", "r": 2},
        "data": {"train": [{"path": "demo:snips/train.jsonl", "rows": 4}]},
        "training": {"steps": 2},
        "jobs": [{"name": "first"}],
    }
)
JOB = "training: {steps: 3}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "queue").mkdir()
    return tmp_path / "queue"


def made(folder: Path, written: Any = ()) -> QueueFolder:
    def read(path: Path) -> JobRecipe:
        return load_job(path, RECIPE)

    return QueueFolder(folder, read, lambda: written)


def refusal(folder: Path, name: str) -> str:
    return (folder / "refused" / f"{name}.txt").read_text()


def test_a_file_becomes_a_command_and_goes_to_the_taken_ones(folder: Path) -> None:
    (folder / "late.yaml").write_text(JOB)
    (folder / "later.yml").write_text(JOB)
    queue = made(folder)
    assert queue.stays_open
    commands = queue.poll()
    assert [(c.what, c.job) for c in commands] == [("add", "late"), ("add", "later")]
    assert queue.poll() == []
    for command in commands:
        queue.answered(command, "")
    assert sorted(p.name for p in (folder / "taken").iterdir()) == ["late.yaml", "later.yml"]
    assert not queue.stays_open


def test_names_that_are_given_twice_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "a.yaml").write_text("name: same\n" + JOB)
    (folder / "b.yaml").write_text("name: same\n" + JOB)
    queue = made(folder)
    (command,) = queue.poll()
    assert "another file of the queue is named 'same'" in refusal(folder, "b")
    queue.answered(command, "a job named 'same' is in this run; choose another name")
    assert "choose another name" in refusal(folder, "a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("training: {stps: 3}\n", "training.stps: unknown key"),
        ("[1, 2", "not valid YAML"),
        ("- 1\n", "must hold keys such as name"),
        ("\x00\x01", "not valid YAML"),
        ("base: other/model\n", "base"),
        ("name: ../up\n", "name"),
        ("method: {name: nothing}\n", "nothing"),
        ("jobs: [{name: a}]\n", "jobs"),
        ("", "must hold keys such as name"),
    ],
)
def test_what_is_no_job_is_refused_with_the_reason(folder: Path, text: str, reason: str) -> None:
    (folder / "bad.yaml").write_text(text)
    assert made(folder).poll() == []
    assert reason in refusal(folder, "bad")
    assert not (folder / "bad.yaml").exists()


def test_what_lies_there_beside_files_of_jobs_is_left_alone(folder: Path) -> None:
    (folder / ".#late.yaml").symlink_to("nobody@nowhere.1")  # an editor's lock
    (folder / ".late.yaml.part").write_text(JOB)
    (folder / "notes.txt").write_text("mine")
    (folder / "folder.yaml").mkdir()
    os.mkfifo(folder / "pipe.yaml")  # reading it would wait for ever
    queue = made(folder)
    assert queue.poll() == []
    assert not queue.stays_open
    assert len(list(folder.iterdir())) == 5


def test_a_file_that_cannot_be_moved_is_refused_once_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stuck(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (folder / "bad.yaml").write_text("[1")
    (folder / "late.yaml").write_text(JOB)
    monkeypatch.setattr("os.replace", stuck)
    queue = made(folder)
    (command,) = queue.poll()
    queue.answered(command, "")
    assert queue.poll() == []
    assert not queue.stays_open
    assert len([r for r in caplog.records if "cannot be moved" in r.getMessage()]) == 2


def test_a_run_that_was_killed_after_it_wrote_a_job_down_does_not_refuse_its_file(
    folder: Path,
) -> None:
    (folder / "late.yaml").write_text(JOB)
    value = load_job(folder / "late.yaml", RECIPE).model_dump(mode="json")
    queue = made(folder, [value])
    assert queue.poll() == []
    assert (folder / "taken" / "late.yaml").is_file()
    (folder / "late.yaml").write_text(
        JOB
    )  # the same again, later: a second job, which the run refuses
    assert [command.job for command in queue.poll()] == ["late"]


def test_without_a_folder_nothing_waits(tmp_path: Path) -> None:
    assert made(tmp_path / "queue").poll() == []
    assert waiting_files(tmp_path) == []
    made(tmp_path / "queue").answered(Command("pause", "first"), "")
