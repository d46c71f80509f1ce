"""Schedulers against each other on recorded traces: `loramux bench schedule`.

Every seed makes one world of jobs (`schedule_trace.py`) and every scheduler plays that same world, so rows are ratios
of pairs, as in the other benches. The reference is what m-LoRA's released code does: first in, first out, a fixed
number of jobs at a time, every row padded to the longest of the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.bench.machine import describe_machine
from loramux.bench.schedule_costs import CallCosts, fit_costs
from loramux.bench.schedule_sim import Assembly, play
from loramux.bench.schedule_trace import Trace, made_world, read_trace, shipped_traces
from loramux.bench.stats import median_interval, paired_ratio
from loramux.bench.table import Row
from loramux.train.joint.budget import TokenBudget
from loramux.train.joint.calls import MAX_TOKENS
from loramux.train.joint.schedule import Adaptive, ByPriority, Fifo, MinPad, RoundRobin, Scheduler

SEEDS, QUICK_SEEDS = 40, 6
NUM_JOBS, QUICK_JOBS = 16, 6
WIDE, NARROW = 0.1, 1 / 3  # shares of a call that are fixed cost
SLOTS = 4  # jobs at a time of the papers' schedulers
REFERENCE = f"fifo {SLOTS}, padded"
COMPARED = ("makespan", "turnaround", "high_priority", "effective")
FIGURES = ("makespan", "turnaround", "p95", "high_priority", "padding", "effective")


@dataclass(frozen=True)
class Subject:
    scheduler: Scheduler
    assembly: Assembly


def subjects(wide: int, narrow: int) -> dict[str, Subject]:
    """By name. Tokens of a round: `wide` where only throughput counts, `narrow` where jobs wait for it."""
    papers: dict[str, Scheduler] = {
        "sequential": Fifo(1),
        f"fifo {SLOTS}": Fifo(SLOTS),
        f"priority {SLOTS}": ByPriority(SLOTS),
        f"minpad {SLOTS}": MinPad(SLOTS),
        **{f"adaptive {SLOTS}, q {q}": Adaptive(SLOTS, q) for q in (0.25, 0.5, 0.75)},
    }
    found = {f"{name}, padded": Subject(each, "padded") for name, each in papers.items()}
    ours: dict[str, Scheduler] = {
        f"fifo {SLOTS}": Fifo(SLOTS),
        "round robin, all": RoundRobin(),
        "budget throughput": TokenBudget("throughput", wide),
        "budget turnaround": TokenBudget("turnaround", narrow),
        "budget fair": TokenBudget("fair", narrow),
        "budget turnaround, weighted": TokenBudget("turnaround", narrow, "weighted"),
    }
    return found | {f"{name}, packed": Subject(each, "packed") for name, each in ours.items()}


def bench_schedule(
    trace: Path | None = None,
    quick: bool = False,
    seeds: int | None = None,
    round_tokens: int | None = None,
) -> dict[str, Any]:
    """Rows of ratios to the reference, the figures of every scheduler, and how well the trace's times are predicted.

    round_tokens: of the budget schedulers; without it where the fixed cost is a tenth of a call for throughput, a third
    for the others.
    """
    traces = shipped_traces() if trace is None else [read_trace(trace)]
    costs = fit_costs([row for each in traces for row in each.rows], traces[0].clock)
    wide, narrow = (
        round_tokens or max(64, min(costs.knee(share), MAX_TOKENS)) for share in (WIDE, NARROW)
    )
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    jobs = QUICK_JOBS if quick else NUM_JOBS
    figures = _figures(traces, costs, subjects(wide, narrow), jobs, count)
    return {
        "bench": "schedule",
        "quick": quick,
        "base": f"costs of {', '.join(each.name for each in traces)}; {jobs} jobs",
        "rounds": count,
        "rows": [row.to_dict() for row in _rows(figures, jobs, quick)],
        "absent": {},
        "details": {
            "figures": {
                name: {key: _spread([one[key] for one in each]) for key in FIGURES}
                for name, each in figures.items()
            },
            "round_tokens": {"throughput": wide, "turnaround": narrow, "fair": narrow},
            "costs": vars(costs),
            "predicted": [_checked(each, traces) for each in traces],
        },
        "machine": describe_machine({}, 1),
    }


def _figures(
    traces: Sequence[Trace],
    costs: CallCosts,
    compared: Mapping[str, Subject],
    num_jobs: int,
    seeds: int,
) -> dict[str, list[dict[str, float]]]:
    """What every scheduler made of every world, in the order of the seeds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    for seed in range(seeds):
        world = made_world(traces, costs, num_jobs, seed)
        for name, each in compared.items():
            played = play(world, each.scheduler, costs, MAX_TOKENS, each.assembly)
            found[name].append(played.figures(world))
    return found


def _rows(
    figures: Mapping[str, Sequence[Mapping[str, float]]], num_jobs: int, quick: bool
) -> list[Row]:
    rows = []
    for what in COMPARED:
        reference = [one[what] for one in figures[REFERENCE]]
        for name, each in figures.items():
            if name == REFERENCE:
                continue
            ratio = paired_ratio([one[what] for one in each], reference)
            verdict = "quick" if quick else ""
            resolved = not quick and not ratio.low <= 1 <= ratio.high
            rows.append(Row(what, name, REFERENCE, 1, num_jobs, ratio, None, verdict, resolved))
    return rows


def _spread(values: Sequence[float]) -> list[float]:
    """Median, and the interval that holds it."""
    found = median_interval(values)
    return [round(value, 4) for value in (found.value, found.low, found.high)]


def _checked(trace: Trace, traces: Sequence[Trace]) -> dict[str, Any]:
    """Seconds of a recorded run against costs that were fitted to the other traces; to itself if it is alone."""
    others = [each for each in traces if each is not trace]
    costs = fit_costs([row for each in others or [trace] for row in each.rows], trace.clock)
    measured, predicted = trace.measured(), trace.predicted(costs)
    return {
        "trace": trace.name,
        "fitted_to": [each.name for each in others] or [trace.name],
        "measured_s": round(measured, 3),
        "predicted_s": round(predicted, 3),
        "error": round(predicted / measured - 1, 4),
        "error_of_a_call": round(costs.error, 4),
    }
