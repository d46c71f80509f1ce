"""A joint run from a recipe: its folder, its queue, its socket and the commands of the command line."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from joint.recipes import JOBS, raw, recipe, write_base
from loramux.cli.jobs import ask, enqueue
from loramux.cli.main import main
from loramux.errors import LoramuxError
from loramux.recipe import dump_recipe, load_recipe
from loramux.train import Listener, StepEvent, Trainer, train_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("joint"))


class At(Listener):
    """Does something after a round, on the training thread."""

    def __init__(self, act: Any, step: int = 2):
        self.act, self.step = act, step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if (event.job, event.step) == ("one", self.step):
            self.act(trainer)


def test_every_job_gets_a_folder_and_a_copy_where_it_wants_one(base: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "run", tmp_path / "elsewhere" / "two"
    wanted.parent.mkdir()
    jobs = [JOBS[0], {**JOBS[1], "out": str(wanted), "priority": 3}]
    result = train_recipe(recipe(base, jobs=jobs), out, progress=False)
    assert [job["status"] for job in result["jobs"]] == ["finished"] * 2
    for job in result["jobs"]:
        assert job["adapter"] == str(out / job["name"] / "adapter")
        assert (out / job["name"] / "history.json").is_file()
        assert list((out / "tensorboard" / job["name"]).glob("events.*"))
    copied = {p.name: p.read_bytes() for p in wanted.iterdir() if p.is_file()}
    assert copied == {
        p.name: p.read_bytes() for p in (out / "two" / "adapter").iterdir() if p.is_file()
    }
    assert not (out / "control").exists()
    assert train_recipe(recipe(base, jobs=jobs), out, resume=True, progress=False) == result


def test_losses_are_those_of_the_same_recipe_by_turns(base: Path, tmp_path: Path) -> None:
    train_recipe(recipe(base), tmp_path / "joint", progress=False, board=False)
    turns = recipe(base, joint=False)
    train_recipe(turns, tmp_path / "turns", progress=False, board=False)
    for job in ("one", "two"):
        rows = [
            json.loads((tmp_path / kind / job / "history.json").read_text())
            for kind in ("joint", "turns")
        ]
        assert [row["loss"] for row in rows[0]] == pytest.approx(
            [row["loss"] for row in rows[1]], abs=1e-3
        )


def test_a_file_in_the_queue_becomes_a_job_and_a_wrong_one_is_refused_with_its_reason(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    queue = out / "queue"

    def drop(_: Trainer) -> None:
        queue.mkdir(exist_ok=True)
        (queue / "wrong.yaml").write_text("training: {stps: 3}\n")
        (queue / "late.yaml").write_text(yaml.safe_dump({"training": {"steps": 2}, "seed": 9}))

    result = train_recipe(recipe(base), out, progress=False, board=False, callbacks=[At(drop)])
    assert [(job["name"], job["steps"]) for job in result["jobs"]] == [
        ("one", 5),
        ("two", 3),
        ("late", 2),
    ]
    assert (queue / "taken" / "late.yaml").is_file()
    assert "training.stps: unknown key" in (queue / "refused" / "wrong.txt").read_text()
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert [(row["what"], row["job"]) for row in journal] == [("add", "late")]


def test_a_job_with_another_base_or_without_its_data_is_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "queue").mkdir(parents=True)
    (out / "queue" / "missing.yaml").write_text("data: {train: [{path: ./nowhere.jsonl}]}\n")
    (out / "queue" / "other.yaml").write_text("base: other/model\n")
    result = train_recipe(recipe(base), out, progress=False, board=False)
    assert len(result["jobs"]) == 2
    assert "base is that of the run" in (out / "queue" / "refused" / "other.txt").read_text()
    assert "nowhere.jsonl" in (out / "queue" / "refused" / "missing.txt").read_text()


def test_the_socket_lists_pauses_resumes_and_cancels(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen: list[Any] = []

    def steer() -> None:
        seen.append(ask(out, {"do": "list"})["jobs"])
        seen.append(ask(out, {"do": "pause", "job": "two", "value": None}))
        seen.append(ask(out, {"do": "list"})["jobs"])
        for request in ({"do": "pause", "job": "nobody"}, {"do": "fly", "job": "one"}, {}):
            with pytest.raises(LoramuxError) as error:
                ask(out, request)
            seen.append(str(error.value))
        seen.append(ask(out, {"do": "cancel", "job": "two"}))

    def begin(_: Trainer) -> None:
        threads.append(threading.Thread(target=steer))
        threads[0].start()

    class Slow(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            if threads and threads[0].is_alive():
                time.sleep(0.05)

    threads: list[threading.Thread] = []
    jobs = [
        {"name": "one", "training": {"steps": 40}},
        {"name": "two", "training": {"steps": 40}},
    ]
    result = train_recipe(
        recipe(base, jobs=jobs), out, progress=False, board=False, callbacks=[At(begin, 1), Slow()]
    )
    threads[0].join()
    assert (out / "control").exists() is False
    assert [row["job"] for row in seen[0]] == ["one", "two"]
    assert seen[0][0]["step"] >= 1
    assert seen[0][0]["left_s"] > 0
    assert seen[1] == {"ok": True}
    assert seen[2][1]["status"] == "paused"
    assert "no job named 'nobody'" in seen[3]
    assert "'do' must be one of list, show, pause" in seen[4]
    assert "one JSON line" in seen[5]
    assert seen[6] == {"ok": True}
    assert [job["status"] for job in result["jobs"]] == ["finished", "cancelled"]
    with pytest.raises(LoramuxError, match="nobody trains in"):
        ask(out, {"do": "list"})


def test_the_sockets_folder_is_its_owners_alone_and_a_deep_path_is_no_obstacle(
    base: Path, tmp_path: Path
) -> None:
    modes: list[int] = []
    out = tmp_path / ("d" * 60) / ("e" * 60) / "run"

    def look(_: Trainer) -> None:
        address = Path((out / "control" / "address").read_text())
        modes.extend([(out / "control").stat().st_mode, address.parent.stat().st_mode])
        assert len(ask(out, {"do": "list"})["jobs"]) == 2

    train_recipe(recipe(base), out, progress=False, board=False, callbacks=[At(look)])
    assert [mode & 0o077 for mode in modes] == [0, 0]


def test_the_command_line_trains_together_and_shows_the_jobs(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "jobs.yaml", tmp_path / "run"
    written = raw(base)
    del written["joint"]
    file.write_text(yaml.safe_dump(written))
    (tmp_path / "extra.yaml").write_text("training: {steps: 2}\n")
    assert main(["jobs", str(out), "list"]) == 2
    assert "holds no joint run" in capsys.readouterr().err
    out.mkdir()
    queued = enqueue(out, tmp_path / "extra.yaml")
    assert queued == out / "queue" / "extra.yaml"
    assert main(["train", str(file), "--joint", "--out", str(out)]) == 0
    assert main(["jobs", str(out), "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out.partition('{\n  "jobs"')[2].join(['{"jobs"', ""]))
    assert [(row["job"], row["status"], row["step"]) for row in rows["jobs"]] == [
        ("one", "finished", 5),
        ("two", "finished", 3),
        ("extra", "finished", 2),
    ]
    assert main(["jobs", str(out), "pause", "one"]) == 2
    assert "nobody trains" in capsys.readouterr().err
    assert main(["jobs", str(out), "pause"]) == 2
    assert main(["jobs", str(out), "priority", "one"]) == 2


def test_the_joint_keys_of_a_recipe_come_back_from_its_dump(base: Path, tmp_path: Path) -> None:
    jobs = [{**JOBS[0], "priority": 4, "out": str(tmp_path / "there")}, JOBS[1]]
    whole = recipe(base, jobs=jobs, joint={"max_tokens": 99, "stay": True})
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(whole))
    assert load_recipe(path) == whole
    one = whole.jobs_resolved()[0]
    path.write_text(dump_recipe(one))
    assert load_recipe(path).jobs_resolved() == [one]
    assert recipe(base, joint=False).joint is None
    with pytest.raises(LoramuxError, match="joint.max_tokns"):
        recipe(base, joint={"max_tokns": 1})
