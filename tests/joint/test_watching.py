"""What a joint run shows and writes down of its rounds: the live table, the lines, `timeline.jsonl`."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from joint.jobs import attached, job, tiny
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import Command, JointTrainer
from loramux.train.joint.live import LiveJobs, PlainJobs, jobs_table, size, totals_line
from loramux.train.joint.table import details, rows, totals
from loramux.train.joint.timeline import TIMELINE, Timeline


class Script:
    """Commands before chosen rounds."""

    stays_open = False

    def __init__(self, script: dict[int, list[Command]]):
        self.script = script
        self.polled = 0

    def poll(self) -> list[Command]:
        self.polled += 1
        return self.script.pop(self.polled, [])

    def answered(self, command: Command, problem: str) -> None:
        assert not problem


class StopAfter(Listener):
    def __init__(self, number: int):
        self.number = number

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if trainer.round == self.number:
            trainer.stop()


def trainer(out: Path | None, *listeners: Listener, script: Any = None) -> JointTrainer:
    base = tiny()
    handle = attached(base, ["lora", "milora"])
    jobs = [job("lora", steps=3), job("milora", steps=6)]
    inbox = Script(script or {})
    return JointTrainer(base, handle, jobs, out=out, resume=True, listeners=listeners, inbox=inbox)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / TIMELINE).read_text().splitlines()]


def test_the_timeline_says_who_stepped_waited_and_ended_in_every_round(tmp_path: Path) -> None:
    script = {2: [Command("pause", "lora")], 4: [Command("resume", "lora")]}
    run = trainer(tmp_path, Timeline(tmp_path), script=script)
    results = {result.name: result for result in run.run()}
    found = lines(tmp_path)
    assert [row["round"] for row in found] == list(range(1, 7))
    assert [sorted(row["steps"]) for row in found[:4]] == [
        ["lora", "milora"], ["milora"], ["milora"], ["lora", "milora"],
    ]  # fmt: skip
    assert [row["paused"] for row in found[:4]] == [[], ["lora"], ["lora"], []]
    assert [row["ended"] for row in found[3:]] == [{}, {"lora": "finished"}, {"milora": "finished"}]
    for name in ("lora", "milora"):
        tokens = [row["steps"][name][0] for row in found if name in row["steps"]]
        assert sum(tokens) == results[name].tokens
    clock = [row[key] for row in found for key in ("start", "end")]
    assert clock == sorted(clock)


def test_a_resumed_run_repeats_no_round_in_its_timeline_and_goes_on_with_its_clock(
    tmp_path: Path,
) -> None:
    trainer(tmp_path, Timeline(tmp_path), StopAfter(4)).run()
    before = lines(tmp_path)
    later = dict(before[-1], round=5)  # of a process that was killed before it saved this round
    with (tmp_path / TIMELINE).open("a") as file:
        file.write(json.dumps(later) + '\n{"round": 6, "st')
    trainer(tmp_path, Timeline(tmp_path)).run()
    found = lines(tmp_path)
    assert found[: len(before)] == before
    assert [row["round"] for row in found] == list(range(1, 7))
    assert before[-1]["end"] <= found[len(before)]["start"] < before[-1]["end"] + 60


class Looks(Listener):
    """The rows and totals after every round."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def rounded(self, trainer: Trainer) -> None:
        assert isinstance(trainer, JointTrainer)
        self.seen.append((rows(trainer), totals(trainer)))


def test_rows_and_totals_follow_the_jobs() -> None:
    looks = Looks()
    script = {2: [Command("pause", "lora")], 4: [Command("resume", "lora")]}
    run = trainer(None, looks, script=script)
    run.run()
    assert looks.seen[1][0][0]["status"] == "paused"
    assert looks.seen[1][1]["jobs"] == {"paused": 1, "running": 1}
    last_rows, last = looks.seen[-1]
    assert [row["status"] for row in last_rows] == ["finished", "finished"]
    assert sum(row["share"] for row in last_rows) == pytest.approx(1, abs=0.01)
    assert last["round"] == 6
    assert last["tokens_per_second"] > 0
    assert details(run, "lora")["job"]["step"] == 3
    with pytest.raises(ValueError, match="no job named 'nobody'"):
        details(run, "nobody")


def drawn(jobs: list[dict[str, Any]], height: int = 0, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    run = {"round": 7, "jobs": {"running": len(jobs)}, "tokens_per_second": 1234.5, "elapsed_s": 62}
    console.print(jobs_table(jobs, run, height))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_table_shows_every_number_and_takes_names_for_text() -> None:
    row = {
        "job": "[red]odd[/red]", "status": "failed", "step": 3, "steps": 9, "loss": 1.23456,
        "tokens_per_second": 4321.0, "share": 0.25, "memory": 3 * 2**20, "left_s": 65.0,
        "reason": "the loss is not finite",
    }  # fmt: skip
    text = drawn([row, {"job": "new", "status": "running", "step": 0, "steps": 9}])
    for part in ("[red]odd[/red]", "failed", "3/9", "1.2346", "4,321", "25 %", "3.0 MiB", "1:05"):
        assert part in text
    assert "the loss is not finite" in text
    assert "round 7 | 1,234 tok/s | 1:02" in text
    assert size(None) == "-"


def test_a_small_terminal_keeps_the_jobs_that_run() -> None:
    ended = [{"job": f"done{i}", "status": "finished"} for i in range(20)]
    text = drawn([*ended, {"job": "mine", "status": "running"}], height=12)
    assert "mine" in text
    assert "and 17 more" in text
    assert len(text.splitlines()) < 12


def test_the_live_table_is_drawn_and_log_lines_stay_out_of_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140, height=30)
    handlers = list(logging.getLogger().handlers)
    streams = [getattr(handler, "stream", None) for handler in handlers]
    live = LiveJobs(console)
    trainer(None, live).run()
    text = stream.getvalue()
    assert "milora" in text
    assert "2 jobs: 2 finished" in text
    assert [getattr(handler, "stream", None) for handler in handlers] == streams


def test_without_a_terminal_there_are_lines_for_jobs_and_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loramux.train.joint.live.TOTAL_SECONDS", -1.0)
    stream = io.StringIO()
    trainer(None, PlainJobs(stream)).run()
    text = stream.getvalue()
    assert "lora: step 3/3" in text
    assert "2 jobs: 2 running | round 1" in text
    assert "\x1b" not in text


def test_the_line_of_all_jobs_leaves_out_what_is_not_known() -> None:
    run = {"round": 3, "jobs": {"stopped": 2}, "is_running": False}
    assert totals_line(run) == "2 jobs: 2 stopped | round 3"
    assert "padding 4 %" in totals_line({**run, "padding": 0.04})
