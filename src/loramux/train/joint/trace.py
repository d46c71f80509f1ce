"""`trace.jsonl` of a joint run: what jobs asked for and what every call cost, for `loramux bench schedule`.

One JSON line for the run, one per job when it comes (the shapes of all its steps), one per round (who was picked, what
each call held, its seconds by the clock and of the process's CPUs). A run that goes on after a kill cuts off the
rounds that it repeats.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.train.runner import JobRunner

TRACE = "trace.jsonl"


@dataclass(frozen=True)
class TimedCall:
    """parts: [job, rows, length] of each."""

    parts: tuple[tuple[str, int, int], ...]
    seconds: float
    cpu: float


class TraceFile:
    """Appends to the trace of a run; without a folder nothing is written."""

    def __init__(self, path: Path | None, last_round: int, about: dict[str, Any]):
        self.path = path
        self._start = time.monotonic()
        self._told: set[str] = set()
        if path is None:
            return
        kept = [row for row in read_rows(path) if row.get("round", 0) <= last_round]
        self._start -= max((row.get("at", 0.0) for row in kept), default=0.0)
        self._told = {row["job"] for row in kept if row["what"] == "job"}
        rows = kept or [{"what": "run", **about}]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_line(row) for row in rows), encoding="utf-8")

    def job(self, number: int, runner: JobRunner) -> None:
        """A job that came before round `number`."""
        name = runner.job.name
        if self.path is None or name in self._told:
            return
        self._told.add(name)
        row = {"what": "job", "job": name, "round": number, "at": self._now()}
        self._append(row | {"priority": runner.job.priority, "steps": steps_of(runner)})

    def round(
        self, number: int, picked: Sequence[str], calls: Sequence[TimedCall], spent: list[float]
    ) -> None:
        """spent: seconds by the clock and of the CPUs, of the whole round."""
        if self.path is None:
            return
        rows = [
            {"parts": call.parts, "seconds": round(call.seconds, 6), "cpu": round(call.cpu, 6)}
            for call in calls
        ]
        seconds, cpu = (round(value, 6) for value in spent)
        about = {"at": self._now(), "seconds": seconds, "cpu": cpu, "picked": list(picked)}
        self._append({"what": "round", "round": number, **about, "calls": rows})

    def _now(self) -> float:
        return round(time.monotonic() - self._start, 4)

    def _append(self, row: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def steps_of(runner: JobRunner) -> list[list[list[int]]]:
    """[rows, length, tokens without padding] of every micro-batch of every step; packed rows as one."""
    train, size = runner.job.train, runner.job.training.gradient_accumulation_steps
    shapes = []
    for part in runner.plan:
        lengths = [len(train[i]) for i in part]
        total = sum(lengths)
        shapes.append([1, total, total] if runner.job.packing else [len(part), max(lengths), total])
    return [shapes[first : first + size] for first in range(0, len(shapes), size)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a trace; [] where there is none. A last line that was cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"
