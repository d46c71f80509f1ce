"""Plays a joint run without training: jobs arrive, a scheduler picks, calls cost what they cost in a recorded run.

The schedulers are the very objects that a run uses, fed with the same `Candidate`s, so nothing is modelled but time.

Two ways to lay rows into a call: "padded", as the papers' code does (every row as long as the longest of the call), and
"packed", as `loramux` does (each job's rows as they are, one behind the other).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Literal

from loramux.bench.schedule_costs import CallCosts, Shape
from loramux.train.joint.schedule import Candidate, Scheduler

Assembly = Literal["packed", "padded"]
Step = tuple[
    tuple[int, int, int], ...
]  # rows, length, tokens without padding, of every micro-batch
MULTIPLE = 8  # the papers' code rounds lengths up to it
ROUND_LIMIT = 1_000_000


@dataclass(frozen=True)
class SimJob:
    """steps: what each holds. at: seconds after the start."""

    name: str
    at: float
    priority: int
    steps: tuple[Step, ...]


@dataclass
class _Running:
    job: SimJob
    arrival: int
    joined: int
    step: int = 0
    served: int = 0
    last_round: int = 0

    def candidate(self) -> Candidate:
        rows, length, _ = max(self.job.steps[self.step], key=lambda part: part[0] * part[1])
        return Candidate(
            self.job.name,
            self.job.priority,
            self.arrival,
            rows * length,
            self.last_round,
            rows,
            length,
            len(self.job.steps) - self.step,
            self.served,
            self.joined,
        )


@dataclass
class Played:
    """How a run went. real, padded: tokens; rounds: who was picked in each."""

    makespan: float = 0.0
    turnaround: dict[str, float] = field(default_factory=dict)
    real: int = 0
    padded: int = 0
    busy: float = 0.0
    rounds: list[list[str]] = field(default_factory=list)

    def figures(self, jobs: Sequence[SimJob]) -> dict[str, float]:
        """What schedulers are compared by. effective: tokens that are no padding, per second of the makespan."""
        top = max(job.priority for job in jobs)
        times = sorted(self.turnaround.values())
        return {
            "makespan": self.makespan,
            "turnaround": mean(times),
            "p95": times[min(len(times) - 1, int(0.95 * len(times)))],
            "high_priority": mean(self.turnaround[job.name] for job in jobs if job.priority == top),
            "padding": 1 - self.real / self.padded if self.padded else 0.0,
            "effective": self.real / self.makespan if self.makespan else 0.0,
        }


def play(
    jobs: Sequence[SimJob],
    scheduler: Scheduler,
    costs: CallCosts,
    max_tokens: int,
    assembly: Assembly = "packed",
) -> Played:
    """Run all jobs to their ends."""
    waiting = sorted(jobs, key=lambda job: job.at)
    running: dict[str, _Running] = {}
    done, clock, number, came = Played(), 0.0, 0, 0
    while waiting or running:
        number += 1
        assert number < ROUND_LIMIT, "a scheduler that picks nobody never ends"
        if not running:
            clock = max(clock, waiting[0].at)
        while waiting and waiting[0].at <= clock:
            job = waiting.pop(0)
            running[job.name] = _Running(job, came, number - 1)
            came += 1
        picked = scheduler.pick(number, [each.candidate() for each in running.values()])
        seconds = _round([running[name] for name in picked], costs, max_tokens, assembly, done)
        clock, done.busy = clock + seconds, done.busy + seconds
        done.rounds.append(picked)
        for name in picked:
            each = running[name]
            each.last_round = number
            each.served += sum(real for _, _, real in each.job.steps[each.step])
            each.step += 1
            if each.step == len(each.job.steps):
                done.turnaround[name] = clock - each.job.at
                del running[name]
    done.makespan = clock - min(job.at for job in jobs)
    return done


def _round(
    picked: Sequence[_Running],
    costs: CallCosts,
    max_tokens: int,
    assembly: Assembly,
    done: Played,
) -> float:
    """Seconds of one step of each; counts its tokens."""
    steps = [each.job.steps[each.step] for each in picked]
    seconds = costs.per_step * len(steps)
    for number in range(max(len(step) for step in steps)):
        parts = [step[number] for step in steps if number < len(step)]
        for call in calls_of(parts, max_tokens):
            shapes: list[Shape] = [(rows, length) for rows, length, _ in call]
            if assembly == "padded":
                longest = max(length for _, length in shapes)
                longest = -(-longest // MULTIPLE) * MULTIPLE
                shapes = [(rows, longest) for rows, _ in shapes]
            seconds += costs.call(shapes)
            done.real += sum(real for _, _, real in call)
            done.padded += sum(rows * length for rows, length in shapes)
    return seconds


def calls_of(
    parts: Sequence[tuple[int, int, int]], max_tokens: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Micro-batches that share a call: in order, up to `max_tokens`, as a joint run does it."""
    group: list[tuple[int, int, int]] = []
    tokens = 0
    for part in parts:
        own = part[0] * part[1]
        if group and tokens + own > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(part)
        tokens += own
    if group:
        yield group
