"""Jobs trained together are timed against jobs in turn, by the trainers themselves."""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from bench.efforts import TINY
from loramux.bench.apart import Apart
from loramux.bench.joint import JOINT, PEFT, SMALL_LOADS, TURNS, Load, Peft, Rounds, make_jobs
from loramux.bench.joint_memory import ALL_ROWS, ONE, memory_rows
from loramux.bench.joint_memory import JOINT as TOGETHER
from loramux.bench.joint_overhead import Clock
from loramux.bench.run import bench
from loramux.bench.shape import build_base
from loramux.bench.table import Row

LOAD = Load(3, 2, 8, "8 jobs/peft")


def test_the_whole_table_is_measured_with_a_target_for_every_promise() -> None:
    effort = replace(TINY, is_quick=True, joint_rounds=1, joint_steps=2)
    rows = bench("train", part="jobs", effort=effort, show_progress=False)["rows"]
    load = SMALL_LOADS[0]
    names = [f"{load.title}, {name}" for name in (JOINT, TURNS, PEFT)]
    pairs = [(row["variant"], row["reference"]) for row in rows]
    assert pairs[:3] == [(names[0], names[2]), (names[1], names[2]), (names[0], names[1])]
    assert [row["target"] for row in rows] == [0.40, None, None, 0.80, 1.25, 1.25, 0.03]
    assert all(row["ms"] > 0 for row in rows)
    assert 0 < rows[-1]["ratio"] < 1


def test_a_round_is_one_step_of_every_job_on_the_same_rows() -> None:
    rounds = Rounds(build_base(TINY.shape, None), LOAD, joint=True)
    rounds.step()
    rounds.step()
    assert [runner.state.step for runner in rounds.trainer.runners] == [2, 2, 2]
    rounds.close()
    jobs = make_jobs(LOAD, 64)
    assert len({job.train[0].input_ids for job in jobs}) == 3
    assert sum(jobs[0].train[0].loss_mask) == 4
    turns = Peft(build_base(TINY.shape, None), LOAD)
    assert [batch["input_ids"].shape for batch in turns.batches] == [(2, 8)] * 3
    at_once = Peft(build_base(TINY.shape, None), LOAD, at_once=True)
    assert [batch["input_ids"].shape for batch in at_once.batches] == [(6, 8)]


def test_memory_is_compared_above_the_base_and_as_whole_processes() -> None:
    known = {
        TOGETHER: {"above": 90.0, "whole": 200.0},
        ALL_ROWS: {"above": 100.0, "whole": 210.0},
        ONE: {"above": 40.0, "whole": 150.0},
    }

    def peak(kind: str, *_: Any) -> dict[str, float]:
        return known[kind]

    def begin(*_: Any) -> Any:
        return lambda: None

    def said(row: Row) -> tuple[float, float | None, str]:
        return row.found.value, row.target, row.verdict

    rows = memory_rows(LOAD, replace(TINY, memory_runs=1), None, begin, peak)
    assert [said(row) for row in rows] == [
        (pytest.approx(0.9), 1.1, "met"),
        (pytest.approx(200 / 450), 0.3, "missed"),
        (pytest.approx(90 / 120), None, ""),
    ]


def test_a_subject_apart_answers_from_its_own_process_and_its_errors_come_through() -> None:
    with Apart(partial, os.getpid) as subject:
        assert subject() == subject() != os.getpid()
    with Apart(partial, "not callable") as subject, pytest.raises(RuntimeError, match="callable"):
        subject()


def test_calls_inside_timed_calls_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("time.process_time", lambda: float(next(ticks)))
    clock = Clock()
    inner = clock.over(lambda: None)
    clock.over(lambda: (inner(), inner()))()
    assert clock.seconds == 1.0
