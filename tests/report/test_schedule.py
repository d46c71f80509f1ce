"""The report of jobs that were trained together: its lanes and sums are those of the timeline, and it stays small."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from loramux.report.build import make_report
from loramux.report.schedule import CELLS, PAUSED, RUNNING, WAITING, lanes_of, throughput
from report.folders import records

EVIL = "x<script>alert(1)"


def row(number: int, start: float, end: float, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"steps": {}, "waiting": [], "paused": [], "ended": {}}
    return {"round": number, "start": start, "end": end, **empty, **more}


ROUNDS = [
    row(1, 0.0, 1.0, steps={"a": [10, 0.5], "b": [30, 0.5]}),
    row(2, 1.0, 2.0, steps={"a": [10, 1.0]}, paused=["b"]),
    row(3, 3.0, 4.0, steps={"a": [20, 1.0]}, paused=["b"], ended={"a": "failed"}),
    row(4, 4.0, 6.0, steps={"b": [30, 2.0]}, waiting=["c"]),
]


def test_lanes_say_when_a_job_ran_waited_and_was_paused() -> None:
    a, b, c = lanes_of(ROUNDS, ["a"])
    assert [kind for _, _, kind in a.segments] == [RUNNING, RUNNING]
    assert a.spent(RUNNING) == pytest.approx(3.0, abs=12 / CELLS)
    assert a.ended == (4.0, "failed")
    assert (a.steps, a.tokens, a.seconds) == (3, 40, 2.5)
    assert [kind for _, _, kind in b.segments] == [RUNNING, PAUSED, RUNNING]
    assert b.spent(PAUSED) == pytest.approx(3.0, abs=12 / CELLS)
    assert b.ended is None
    assert c.segments == [(pytest.approx(4.0, abs=0.02), pytest.approx(6.0), WAITING)]


def test_the_throughput_adds_up_to_all_tokens() -> None:
    edges, speed = throughput(ROUNDS, 6.0)
    assert sum(speed) * (edges[1] - edges[0]) == pytest.approx(100, abs=0.1)


def test_a_step_that_failed_at_once_is_a_piece_of_its_lane() -> None:
    (lane, _) = lanes_of([row(1, 0, 1, steps={"b": [1, 1]}, ended={"a": "failed"})], ["a", "b"])
    assert [kind for _, _, kind in lane.segments] == [RUNNING]
    assert lane.steps == 0


def folder_of(path: Path, names: list[str], rounds: list[dict[str, Any]], steps: int) -> Path:
    path.mkdir()
    jobs = {name: {"name": name, "method": {"name": "lora"}} for name in names[:-1]}
    (path / "run.json").write_text(json.dumps({"jobs": jobs}))
    late = {"name": names[-1], "method": {"name": "dora"}}
    line = {"round": 1, "what": "add", "job": names[-1], "value": late}
    (path / "journal.jsonl").write_text(json.dumps(line) + "\n")
    (path / "timeline.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rounds))
    history = [{"step": i, "loss": 3.0 / i, "lr": 1e-3} for i in range(1, steps + 1)]
    for name in names:
        (path / name).mkdir()
        (path / name / "history.json").write_text(json.dumps(history))
    return path


def test_hundreds_of_rounds_of_many_jobs_make_a_small_page(tmp_path: Path) -> None:
    names = [f"job{i}" for i in range(8)] + [EVIL]
    draw = random.Random(0)
    rounds = []
    for number in range(1, 601):
        picked = draw.sample(names, 5)
        steps = {name: [64, 0.02] for name in picked}
        idle = [name for name in names if name not in picked]
        ended = dict.fromkeys(names, "finished") if number == 600 else {}
        rounds.append(
            row(number, number / 10, number / 10 + 0.1, steps=steps, waiting=idle, ended=ended)
        )
    run = folder_of(tmp_path / "run", names, rounds, steps=3000)
    made = make_report(run)
    assert {"Jobs", "Training", "Schedule"} <= set(made["sections"])
    assert made["bytes"] < 4_000_000
    page = Path(made["report"])
    assert EVIL not in page.read_text().split('id="records"')[0]
    found = records(page)
    assert list(found["schedule"]) == names
    assert sum(lane["tokens"] for lane in found["schedule"].values()) == 600 * 5 * 64
    assert max(len(lane["segments"]) for lane in found["schedule"].values()) <= CELLS
    assert len(found["history"][EVIL]) < 3000


def test_a_broken_timeline_costs_its_section_only(tmp_path: Path) -> None:
    run = folder_of(tmp_path / "run", ["a", "b"], [{"round": 1, "ended": {}}], steps=3)
    made = make_report(run)
    assert "Training" in made["sections"]
    assert "Schedule" in [part["what"] for part in made["missing"]]
