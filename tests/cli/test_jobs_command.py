"""`loramux jobs`: what it says of runs that go on, have ended, were killed, or are somebody else's."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from loramux.cli.jobs_read import ask, describe, history_rows, is_running, standing
from loramux.cli.main import main
from loramux.errors import LoramuxError
from loramux.train.joint.control import Control, InUseError

RESULT = {
    "name": "done", "status": "failed", "reason": "the loss of step 3 is not finite", "steps": 2, "num_steps": 9,
    "train_loss": 1.5, "val_loss": None, "tokens_per_second": 99.96,
}  # fmt: skip
STATE = {
    "step": 4, "tokens": 100, "seconds": 2.0, "best_loss": 1.25,
    "history": [{"step": 4, "loss": 1.1}, {"step": 4, "val_loss": 1.25}],
}  # fmt: skip


def saved(name: str, **more: Any) -> dict[str, Any]:
    empty = {"identity": {}, "priority": 0, "is_paused": False, "state": None, "result": None}
    return {"name": name, "num_steps": 9, **empty, **more}


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run that was killed after round 4: one job had failed, one was paused, one ran."""
    folder = tmp_path / "checkpoints" / "00000004"
    folder.mkdir(parents=True)
    jobs = [
        saved("done", result=RESULT),
        saved("waits", state=STATE, is_paused=True),
        saved("runs", state=STATE, priority=2),
    ]
    (folder / "run.json").write_text(json.dumps({"round": 4, "jobs": jobs}))
    asked = [
        {"round": 2, "what": "pause", "job": "waits", "value": None},
        {"round": 3, "what": "priority", "job": "runs", "value": 2},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    rounds = [{"round": i, "steps": {"runs": [1, 0.1]}} for i in range(1, 5)]
    text = "".join(json.dumps(line) + "\n" for line in rounds) + '{"round": 5, "st'
    (tmp_path / "timeline.jsonl").write_text(text)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    (tmp_path / "runs" / "history.json").write_text(json.dumps(STATE["history"]))
    return tmp_path


QUESTIONS: dict[str, Any] = {
    "list": lambda _: {
        "jobs": [{"job": "one", "status": "running", "step": 1}],
        "run": {"round": 1, "jobs": {"running": 1}},
    },
    "show": lambda name: {"job": {"job": name}, "history": [{"step": 1, "loss": 2.0}]},
}


def test_a_run_that_was_killed_says_how_its_jobs_stood(ended: Path) -> None:
    found = standing(ended)
    assert found["run"] == {
        "round": 4, "jobs": {"failed": 1, "paused": 1, "stopped": 1}, "is_running": False,
    }  # fmt: skip
    done, waits, runs = found["jobs"]
    assert (done["step"], done["steps"], done["reason"]) == (2, 9, RESULT["reason"])
    assert (waits["status"], waits["loss"], waits["val_loss"]) == ("paused", 1.1, 1.25)
    assert (runs["tokens_per_second"], runs["priority"], runs["left_s"]) == (50.0, 2, None)
    assert done.keys() == runs.keys()


def test_one_job_is_shown_with_its_folder_and_its_history(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = describe(ended, "runs")
    assert found["job"]["adapter"] == str(ended / "runs" / "best")
    assert [(e["round"], e["what"]) for e in found["events"]] == [
        (1, "first step"),
        (3, "priority 2"),
        (4, "step 4, stopped"),
    ]
    assert main(["jobs", str(ended), "show", "done"]) == 0
    assert "the loss of step 3 is not finite" in capsys.readouterr().out
    assert main(["jobs", str(ended), "logs", "runs"]) == 0
    assert "the last 2 of 2 rows" in capsys.readouterr().out
    assert main(["jobs", str(ended), "logs", "waits"]) == 0
    assert "no history yet" in capsys.readouterr().out
    assert main(["jobs", str(ended), "show", "nobody"]) == 2
    assert "there are ['done', 'waits', 'runs']" in capsys.readouterr().err


def test_a_folder_that_a_killed_run_left_is_not_taken_for_a_run(ended: Path) -> None:
    (ended / "control").mkdir()
    (ended / "control" / "address").write_text(str(ended / "control" / "jobs.sock"))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.path.relpath(ended / "control" / "jobs.sock"))
    assert not is_running(ended)
    assert standing(ended)["run"]["is_running"] is False
    with pytest.raises(LoramuxError, match="nobody trains in"):
        ask(ended, {"do": "pause", "job": "runs"})
    with Control(ended, QUESTIONS):
        assert is_running(ended)


def test_a_run_that_goes_on_is_asked_and_a_second_one_in_its_folder_is_refused(
    ended: Path,
) -> None:
    with Control(ended, QUESTIONS):
        assert standing(ended)["jobs"][0]["job"] == "one"
        assert standing(ended)["run"] == {"round": 1, "jobs": {"running": 1}, "is_running": True}
        assert history_rows(ended, "one") == [{"step": 1, "loss": 2.0}]
        with pytest.raises(InUseError, match="another process trains in"), Control(ended, {}):
            pass
        assert is_running(ended)
    assert not is_running(ended)


def test_the_run_of_somebody_else_and_one_that_does_not_answer_are_told_apart(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ended / "control").mkdir()
    place = ended / "control" / "address"
    place.write_text("anywhere")

    def raising(error: OSError) -> None:
        def connect(*_: Any) -> None:
            raise error

        monkeypatch.setattr("loramux.cli.jobs_read._connect", connect)

    raising(PermissionError(13, "Permission denied"))
    with pytest.raises(LoramuxError, match="belongs to .*, who alone may ask it"):
        standing(ended)
    raising(TimeoutError("timed out"))
    with pytest.raises(LoramuxError, match="has not answered for 40 s"):
        standing(ended)


def test_what_cannot_be_asked_is_said_before_anything_is_done(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, text in (
        (["pause", "runs", "3"], "pause takes no number"),
        (["priority", "runs"], "priority needs a number"),
        (["show"], "name a job"),
        (["add"], "name a file"),
        (["pause", "runs", "--watch"], "--watch goes with the list"),
    ):
        assert main(["jobs", str(ended), *args]) == 2
        assert text in capsys.readouterr().err
    (tmp_path / "starting").mkdir()
    (tmp_path / "starting" / "run.json").write_text("{}")
    assert main(["jobs", str(tmp_path / "starting")]) == 2
    assert "is loading its base and data" in capsys.readouterr().err


def test_watching_a_run_that_has_ended_shows_the_table_once(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", str(ended), "--watch"]) == 0
    out = capsys.readouterr().out
    assert out.count("waits") == 1
    assert "nobody trains here now" in out


def test_a_job_that_is_added_to_a_run_that_has_ended_says_when_it_will_be_trained(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ended / "extra.yaml"
    file.write_text("training: {steps: 2}\n")
    assert main(["jobs", str(ended), "add", str(file)]) == 0
    assert "go on with the command that started it" in capsys.readouterr().out
    assert main(["jobs", str(ended), "add", str(file)]) == 2
    assert "is waiting already" in capsys.readouterr().err
