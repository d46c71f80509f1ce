"""Recorded joint runs: the jobs of a trace, worlds made of them by chance, and how well its costs are predicted."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loramux.bench.schedule_costs import CallCosts, Shape, fit_costs
from loramux.bench.schedule_sim import SimJob, Step
from loramux.errors import LoramuxError

SHIPPED = Path(__file__).parent / "traces"
LENGTHS = (1, 2, 4)  # a job of a made world has so many times the steps of a recorded one
PRIORITIES = (0, 0, 0, 1, 2)
LOAD = (
    0.15  # of the time that the jobs would take one after the other; all are there early, and wait
)


@dataclass(frozen=True)
class Trace:
    name: str
    about: Mapping[str, Any]
    jobs: tuple[SimJob, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def clock(self) -> str:
        """CPU seconds of the process where it did the work; by the clock where a device did."""
        return "cpu" if self.about.get("device") == "cpu" else "seconds"

    def costs(self) -> CallCosts:
        return fit_costs(self.rows, self.clock)

    def measured(self) -> float:
        """Seconds of all recorded rounds."""
        return sum(float(row[self.clock]) for row in self.rows if row["what"] == "round")

    def predicted(self, costs: CallCosts) -> float:
        """The same by the costs: what was picked and laid into calls is taken from the trace."""
        total = 0.0
        for row in self.rows:
            if row["what"] != "round":
                continue
            total += costs.per_step * len(row["picked"])
            for call in row["calls"]:
                shapes: list[Shape] = [(rows, length) for _, rows, length in call["parts"]]
                total += costs.call(shapes)
        return total


def read_trace(path: Path) -> Trace:
    """`trace.jsonl` of a joint run, or its folder."""
    from loramux.train.joint.trace import TRACE, read_rows

    file = path / TRACE if path.is_dir() else path
    rows = read_rows(file)
    if not rows or rows[0].get("what") != "run":
        raise LoramuxError(
            f"{file} is no trace of a joint run; `loramux train RECIPE --joint --out DIR` writes DIR/{TRACE}"
        )
    jobs = tuple(_job(row) for row in rows if row["what"] == "job")
    if not jobs:
        raise LoramuxError(f"{file} holds no job; record a run that got to its first round")
    return Trace(
        file.stem if file.stem != "trace" else file.parent.name, rows[0], jobs, tuple(rows)
    )


def _job(row: Mapping[str, Any]) -> SimJob:
    steps: list[Step] = [
        tuple((int(b), int(t), int(real)) for b, t, real in step) for step in row["steps"]
    ]
    # Reading the first jobs takes a moment, but all of them are there when the first round begins.
    at = float(row["at"]) if row["round"] else 0.0
    return SimJob(row["job"], at, int(row["priority"]), tuple(steps))


def shipped_traces() -> list[Trace]:
    return [read_trace(path) for path in sorted(SHIPPED.glob("*.jsonl"))]


def made_world(traces: Sequence[Trace], costs: CallCosts, num_jobs: int, seed: int) -> list[SimJob]:
    """Jobs drawn from the recorded ones, of other lengths and priorities, that arrive one by one."""
    draw = random.Random(json.dumps([seed, num_jobs]))
    known = [job for trace in traces for job in trace.jobs]
    found: list[SimJob] = []
    at = 0.0
    for number in range(num_jobs):
        job = draw.choice(known)
        steps = job.steps * draw.choice(LENGTHS)
        made = replace(
            job, name=f"{number}-{job.name}", steps=steps, priority=draw.choice(PRIORITIES), at=at
        )
        found.append(made)
        at += draw.expovariate(1.0) * LOAD * alone(made, costs)
    return found


def alone(job: SimJob, costs: CallCosts) -> float:
    """Seconds of a job that has the machine for itself."""
    calls = sum(costs.call([(rows, length)]) for step in job.steps for rows, length, _ in step)
    return calls + costs.per_step * len(job.steps)
