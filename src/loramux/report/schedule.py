"""Jobs that were trained together: who ran when, who waited, and how fast it went, from `timeline.jsonl`.

A run of many rounds is drawn from at most CELLS equal pieces of its time per job, so that a picture and its numbers
stay small: a piece in which a job took a step counts as running, one without as waiting or paused.

Letters: J jobs, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from loramux.report.charts import short
from loramux.report.html import duration
from loramux.report.page import Missing, Section, Table, picture
from loramux.report.plots import PALETTE, figure_of, styled
from loramux.report.records import FolderRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

CELLS = 600  # pieces of time that states are told apart in
BINS = 60  # pieces of time of the throughput
MOST_LANES = 64
ABSENT, WAITING, PAUSED, RUNNING = range(4)
STATES = ("absent", "waiting", "paused", "running")
LOOKS = {WAITING: ("#d5dae0", ""), PAUSED: ("#f3d48f", "////"), RUNNING: ("#0072b2", "")}
ENDS = {"finished": "o", "stopped_early": "s", "cancelled": "D", "failed": "X"}


@dataclass(frozen=True)
class Lane:
    """One job. segments: (start, end, state), merged; ended: when and how; tokens and seconds of its steps."""

    name: str
    segments: Sequence[tuple[float, float, int]]
    ended: tuple[float, str] | None
    steps: int
    tokens: int
    seconds: float

    @property
    def first(self) -> float:
        return self.segments[0][0] if self.segments else 0.0

    def spent(self, state: int) -> float:
        return sum(end - start for start, end, kind in self.segments if kind == state)


def schedule_section(record: FolderRecord) -> Section | Missing | None:
    """None for a run that is no joint one."""
    rounds = record.timeline
    if not rounds:
        return None
    lanes = lanes_of(rounds, [job.name for job in record.jobs])
    total = max(float(row["end"]) for row in rounds)
    edges, speed = throughput(rounds, total)
    tokens = sum(lane.tokens for lane in lanes)
    text = (
        f"{len(rounds):,} rounds in {duration(total)}; in a round every job that was picked takes one step. "
        f"{tokens:,} tokens, {tokens / max(total, 1e-9):,.0f} per second."
    )
    padding = record.result.get("padding")
    if isinstance(padding, int | float):
        text += f" {100 * padding:.1f} % of what the calls computed was padding."
    drawn = lanes[:MOST_LANES]
    lane_caption = (
        "One lane per job. Blue: in steps; grey: waiting for its turn; hatched: paused; the mark is its end (cross: "
        f"failed). A piece of 1/{CELLS} of the time in which it took a step is blue; white: nobody stepped, as while a "
        "state is written."
    )
    if len(lanes) > MOST_LANES:
        lane_caption += f" The first {MOST_LANES} of {len(lanes)} jobs."
    alt = "; ".join(f"{lane.name} {_story(lane, total)}" for lane in drawn)
    figures = [
        picture(lanes_chart(drawn, total), f"Schedule: {alt}.", lane_caption, _lane_table(lanes)),
        picture(
            work_chart(lanes, edges, speed),
            f"Throughput between {min(speed):,.0f} and {max(speed):,.0f} tokens per second; shares of the time: "
            + "; ".join(f"{lane.name} {100 * share:.0f} %" for lane, share in _shares(lanes))
            + ".",
            "Tokens of all jobs per second of the run, and whose steps the time was spent in. A call that several jobs "
            "share is divided by their tokens.",
            Table(
                ("from (s)", "tokens per second"),
                [list(p) for p in zip(edges, speed, strict=False)],
            ),
        ),
    ]
    records: dict[str, Any] = {"schedule": {lane.name: _lane_record(lane) for lane in lanes}}
    records["throughput"] = {"edges": edges, "tokens_per_second": speed}
    return Section("Schedule", text, figures=figures, records=records)


def result_section(record: FolderRecord) -> Section | None:
    """How every job of a joint run ended, with the reason."""
    if not record.timeline or len(record.jobs) < 2:
        return None
    ends = {name: how for row in record.timeline for name, how in row["ended"].items()}
    columns = ["job", "status", "steps", "of", "training loss", "validation loss", "tokens/s"]
    sizes, text = _memory(record.result)
    columns += ["largest call, predicted (MiB)"] if sizes else []
    rows = []
    for job in record.jobs:
        result = job.result
        speed = result.get("tokens_per_second")
        cells = [
            job.name,
            result.get("status") or ends.get(job.name) or "not finished",
            result.get("steps"),
            result.get("num_steps"),
            result.get("train_loss"),
            result.get("val_loss"),
            None if speed is None else round(speed),
        ]
        if sizes:
            cells.append(sizes[job.name] / 2**20 if job.name in sizes else None)
        rows.append([*cells, result.get("reason") or ""])
    return Section("Jobs", text, tables=[Table([*columns, "reason"], rows)])


def _memory(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """(bytes of each job's largest call as predicted, how good predictions were), of a run with a limit."""
    found = result.get("memory")
    if not isinstance(found, Mapping) or not isinstance(found.get("largest_call"), Mapping):
        return {}, ""
    text = f"Calls were held below {found['limit'] / 2**20:,.0f} MiB above the base."
    if found.get("mean_error") is not None:
        text += (
            f" Predictions of {found['measured_calls']} measured calls were off by "
            f"{100 * found['mean_error']:.1f} % on average."
        )
    return found["largest_call"], text


def lanes_of(rounds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Lane]:
    """A lane per job, in the order of `names`; those that only the rounds name follow."""
    seen = [name for row in rounds for key in ("steps", "waiting", "paused") for name in row[key]]
    order = list(dict.fromkeys([*names, *seen]))
    place = {name: i for i, name in enumerate(order)}
    total = max(float(row["end"]) for row in rounds)
    state_JC = np.zeros((len(order), CELLS), dtype=np.int8)
    ended: dict[str, tuple[float, str]] = {}
    sums = {name: [0, 0, 0.0] for name in order}
    before = 0.0
    for row in rounds:
        start, end = float(row["start"]), float(row["end"])
        # What does not step waits from the end of the last round on, also while nobody could step.
        for state, key in ((WAITING, "waiting"), (PAUSED, "paused")):
            for name in row[key]:
                _fill(state_JC[place[name]], before, end, total, state)
        for name, (tokens, seconds) in row["steps"].items():
            _fill(state_JC[place[name]], start, end, total, RUNNING)
            for i, value in enumerate((1, tokens, seconds)):
                sums[name][i] += value
        for name in row["ended"]:
            if row["ended"][name] == "failed" and name in place:  # at its step of this round
                _fill(state_JC[place[name]], start, end, total, RUNNING)
        ended |= {name: (end, status) for name, status in row["ended"].items() if name in place}
        before = end
    return [
        Lane(
            name,
            _merged(state_JC[i], total),
            ended.get(name),
            int(sums[name][0]),
            int(sums[name][1]),
            float(sums[name][2]),
        )
        for name, i in place.items()
    ]


def _fill(cells: NDArray[np.int8], start: float, end: float, total: float, state: int) -> None:
    """Mark the pieces of [start, end]; a stronger state stays."""
    first = min(int(start / max(total, 1e-9) * CELLS), CELLS - 1)
    last = max(first + 1, math.ceil(end / max(total, 1e-9) * CELLS))
    np.maximum(cells[first:last], state, out=cells[first:last])


def _merged(cells: NDArray[np.int8], total: float) -> list[tuple[float, float, int]]:
    """Neighbouring pieces of one state as one segment; where the job was not there, none."""
    at = [0, *(np.flatnonzero(np.diff(cells)) + 1).tolist(), len(cells)]
    width = total / CELLS
    return [(a * width, b * width, int(cells[a])) for a, b in pairwise(at) if cells[a] != ABSENT]


def throughput(
    rounds: Sequence[Mapping[str, Any]], total: float
) -> tuple[list[float], list[float]]:
    """(starts of equal pieces of the time, tokens per second in each); a round's tokens lie evenly over it."""
    bins = max(1, min(BINS, len(rounds)))
    width = max(total, 1e-9) / bins
    made = np.zeros(bins)
    for row in rounds:
        start, end = float(row["start"]), max(float(row["end"]), float(row["start"]) + 1e-9)
        tokens = sum(each[0] for each in row["steps"].values())
        first, last = int(start / width), min(int(end / width), bins - 1)
        for i in range(min(first, bins - 1), last + 1):
            overlap = min(end, (i + 1) * width) - max(start, i * width)
            made[i] += tokens * max(overlap, 0.0) / (end - start)
    return [round(i * width, 4) for i in range(bins)], [round(float(t / width), 2) for t in made]


@styled
def lanes_chart(lanes: Sequence[Lane], total: float) -> Figure:
    """A lane per job over the time of the run."""
    from matplotlib.patches import Patch

    figure, axes = figure_of(1, 1, (11.0, min(1.5 + 0.32 * len(lanes), 22.0)))
    axis = axes[0]
    for y, lane in enumerate(lanes):
        for state, (colour, hatch) in LOOKS.items():
            spans = [(a, b - a) for a, b, kind in lane.segments if kind == state]
            if spans:
                axis.broken_barh(
                    spans,
                    (y - 0.36, 0.72),
                    facecolor=colour,
                    hatch=hatch,
                    edgecolor="#8a939c",
                    lw=0,
                )
        if lane.ended is not None:
            at, how = lane.ended
            colour = "#d55e00" if how == "failed" else "#1c2024"
            axis.plot(at, y, ENDS.get(how, "o"), color=colour, ms=7, mec="white", zorder=3)
    axis.set_yticks(range(len(lanes)), [short(lane.name, 26) for lane in lanes])
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.set_xlim(0, max(total, 1e-9) * 1.01)
    axis.set_xlabel("seconds of the run")
    axis.grid(visible=False, axis="y")
    found = {kind for lane in lanes for _, _, kind in lane.segments}
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="#8a939c", lw=0, label=STATES[state])
        for state, (colour, hatch) in LOOKS.items()
        if state in found
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def work_chart(lanes: Sequence[Lane], edges: Sequence[float], speed: Sequence[float]) -> Figure:
    """Throughput over the time, and the share of the time by job."""
    shares = _shares(lanes)[:MOST_LANES]
    high = min(max(3.4, 1.2 + 0.26 * len(shares)), 20.0)
    figure, (left, right) = figure_of(1, 2, (11.0, high), width_ratios=(1.3, 1.0))
    width = edges[1] - edges[0] if len(edges) > 1 else 1.0
    left.stairs(speed, [*edges, edges[-1] + width], color=PALETTE[0], lw=1.8)
    left.set_title("Tokens per second, all jobs")
    left.set_xlabel("seconds of the run")
    left.set_ylim(0, max([*speed, 1e-9]) * 1.08)
    right.barh(range(len(shares)), [100 * share for _, share in shares], 0.7, color=PALETTE[0])
    right.set_yticks(range(len(shares)), [short(lane.name, 22) for lane, _ in shares])
    right.set_ylim(len(shares) - 0.4, -0.6)
    right.set_title("Share of the time in steps")
    right.set_xlabel("per cent")
    right.grid(visible=False, axis="y")
    return figure


def _shares(lanes: Sequence[Lane]) -> list[tuple[Lane, float]]:
    total = sum(lane.seconds for lane in lanes)
    return [(lane, lane.seconds / total if total else 0.0) for lane in lanes]


def _story(lane: Lane, total: float) -> str:
    end = f", {lane.ended[1]} at {lane.ended[0]:.3g} s" if lane.ended else ", not ended"
    return f"from {lane.first:.3g} s, {lane.steps} steps{end}"


def _lane_table(lanes: Sequence[Lane]) -> Table:
    columns = ("job", "from (s)", "end (s)", "end", "steps", "tokens", "in steps (s)", "share",
               "waiting (s)", "paused (s)")  # fmt: skip
    rows = [
        [
            lane.name,
            lane.first,
            lane.ended[0] if lane.ended else None,
            lane.ended[1] if lane.ended else "not ended",
            lane.steps,
            lane.tokens,
            lane.seconds,
            share,
            lane.spent(WAITING),
            lane.spent(PAUSED),
        ]
        for lane, share in _shares(lanes)
    ]
    return Table(columns, rows)


def _lane_record(lane: Lane) -> dict[str, Any]:
    return {
        "segments": [[round(a, 4), round(b, 4), STATES[kind]] for a, b, kind in lane.segments],
        "ended": None if lane.ended is None else list(lane.ended),
        "steps": lane.steps,
        "tokens": lane.tokens,
        "seconds": round(lane.seconds, 4),
    }
