"""The schedule bench: costs, the simulator against real runs and against counting by hand, the bubble formulas."""

import json
import random
from pathlib import Path

import pytest

from joint.jobs import attached, job, tiny
from loramux.bench.pipeline import (
    gpipe_bubble,
    lorapp_bubble,
    relative_throughput,
    simulated_bubble,
)
from loramux.bench.schedule import REFERENCE, bench_schedule
from loramux.bench.schedule_costs import CallCosts, fit_costs
from loramux.bench.schedule_sim import SimJob, play
from loramux.bench.schedule_trace import made_world, read_trace, shipped_traces
from loramux.errors import LoramuxError
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import JointTrainer
from loramux.train.joint.budget import TokenBudget
from loramux.train.joint.schedule import ByPriority, Fifo, MinPad, Scheduler

COSTS = CallCosts(fixed=1.0, per_job=0.1, per_token=0.01, per_square=0.0, per_step=0.0)


def sim(name: str, lengths: list[int], at: float = 0.0, priority: int = 0) -> SimJob:
    return SimJob(name, at, priority, tuple(((1, n, n),) for n in lengths))


def test_costs_are_recovered_from_the_calls_they_made() -> None:
    draw, want = random.Random(0), CallCosts(0.2, 0.05, 0.002, 1e-5, 0.03)
    rows = []
    for _ in range(30):
        shapes = [(draw.randint(1, 4), draw.randint(8, 90)) for _ in range(draw.randint(1, 6))]
        seconds = want.call(shapes)
        call = {"parts": [[str(i), *s] for i, s in enumerate(shapes)], "cpu": seconds}
        picked = [str(i) for i in range(len(shapes))]
        spent = seconds + 0.03 * len(shapes)
        rows.append({"what": "round", "picked": picked, "calls": [call], "cpu": spent})
    found = fit_costs(rows)
    assert vars(found) == pytest.approx({**vars(want), "error": 0, "calls": 30}, abs=1e-9)
    assert found.knee(0.1) == pytest.approx(900)
    with pytest.raises(LoramuxError, match="at least 8 model calls"):
        fit_costs(rows[:3])


def test_time_tokens_and_turnaround_of_a_small_world_are_those_counted_by_hand() -> None:
    jobs = [sim("a", [10, 10]), sim("b", [30]), sim("c", [20], at=1.0)]
    packed = play(jobs, Fifo(2), COSTS, 4096)
    # a and b: 1 + 0.2 + 0.4 = 1.6 seconds; then a and c: 1 + 0.2 + 0.3.
    assert packed.rounds == [["a", "b"], ["a", "c"]]
    assert packed.makespan == pytest.approx(3.1)
    assert packed.turnaround == pytest.approx({"b": 1.6, "a": 3.1, "c": 2.1})
    assert packed.figures(jobs)["padding"] == 0
    padded = play(jobs, Fifo(2), COSTS, 4096, "padded")
    assert padded.padded == 64 + 48
    assert padded.figures(jobs)["padding"] == pytest.approx(1 - 70 / 112)
    assert play(jobs, Fifo(2), COSTS, 35).makespan > packed.makespan, "calls are cut at max_tokens"


@pytest.mark.parametrize(
    "scheduler", [TokenBudget("turnaround", 40), ByPriority(2), MinPad(2)], ids=str
)
def test_the_simulator_picks_what_a_real_run_picked(scheduler: Scheduler, tmp_path: Path) -> None:
    names = ["lora", "milora", "mixlora"]
    base = tiny()
    handle = attached(base, names)
    jobs = [job(name, steps=3 + i, priority=i % 2) for i, name in enumerate(names)]
    JointTrainer(base, handle, jobs, out=tmp_path, scheduler=scheduler).run()
    trace = read_trace(tmp_path)
    recorded = [row for row in trace.rows if row["what"] == "round"]
    played = play([*trace.jobs], scheduler, trace.costs(), 4096)
    assert played.rounds == [row["picked"] for row in recorded]
    shapes = [[[b, t] for _, b, t in call["parts"]] for row in recorded for call in row["calls"]]
    assert played.padded == sum(b * t for call in shapes for b, t in call)
    assert trace.predicted(trace.costs()) == pytest.approx(played.busy)


def test_a_resumed_run_writes_every_round_into_its_trace_once(tmp_path: Path) -> None:
    class StopAfter(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            if trainer.round == 3:
                trainer.stop()

    for listeners in ([StopAfter()], []):
        base = tiny()
        handle = attached(base, ["lora"])
        each = job("lora", steps=5)
        JointTrainer(base, handle, [each], out=tmp_path, resume=True, listeners=listeners).run()
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["run", "job", *["round"] * 5]
    assert [row["round"] for row in rows[2:]] == [1, 2, 3, 4, 5]
    assert [row["at"] for row in rows[1:]] == sorted(row["at"] for row in rows[1:])


def test_the_shipped_traces_give_worlds_in_which_padding_and_order_matter() -> None:
    traces = shipped_traces()
    assert len(traces) == 2
    assert made_world(traces, COSTS, 5, seed=1) == made_world(traces, COSTS, 5, seed=1)
    result = bench_schedule(seeds=2)
    figures = result["details"]["figures"]
    assert figures["minpad 4, padded"]["padding"][0] < figures[REFERENCE]["padding"][0]
    assert (
        figures["budget turnaround, packed"]["turnaround"][0] < figures[REFERENCE]["turnaround"][0]
    )
    assert all(abs(one["error"]) < 0.3 for one in result["details"]["predicted"])
    assert json.loads(json.dumps(result)) == result


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(LoramuxError, match="no trace of a joint run"):
        read_trace(tmp_path / "some.jsonl")


def test_bubbles_of_the_simulated_pipeline_are_those_of_the_formulas() -> None:
    assert lorapp_bubble(4, 2) == 0.5
    assert lorapp_bubble(4, 4) == lorapp_bubble(4, 7) == 0.0
    for stages in (1, 2, 3, 4, 6):
        for jobs in (1, 2, 3, 4, 7):
            want = lorapp_bubble(stages, jobs)
            assert simulated_bubble(stages, jobs) == pytest.approx(want, abs=0.02)
        for parts in (1, 2, 4):
            want = gpipe_bubble(stages, parts)
            assert lorapp_bubble(stages, 1, parts) == pytest.approx(want)
            assert simulated_bubble(stages, 1, parts) == pytest.approx(want, abs=0.02)
            # Where jobs and micro-batches meet, the formula counts no collisions: it is a lower bound.
            assert simulated_bubble(stages, 2, parts) >= lorapp_bubble(stages, 2, parts) - 0.02
    assert relative_throughput(gpipe_bubble(4, 1), lorapp_bubble(4, 4)) == pytest.approx(4)
    with pytest.raises(ValueError, match="at least 1"):
        lorapp_bubble(0, 1)
