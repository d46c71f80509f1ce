"""Files of a run that a report draws: what the routers did (`routing.jsonl`), written while it trains.

Why a file beside TensorBoard's: it is read without extra packages, and its numbers are those of named steps, so a
report can be checked against it. One line per recorded step: {"step", "columns", "routers": [{"path", "layer", "when",
"columns" (an index), "count", "entropy", "share", "pairs" [[i, j, share of joint use], ...]}]}. The numbers describe
the step's last micro-batch; `metrics.py` defines them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener, StepEvent
from loramux.train.metrics import RouterStat, router_stats

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner
    from loramux.train.trainer import JobResult, Trainer

ROUTING = "routing.jsonl"
MAX_LINES = 60  # a run records about so many steps ...
MAX_NUMBERS = 250_000  # ... and fewer where a line is long
MAX_PAIRS = 120  # per router and line: all pairs of 16 columns, the commonest of more
DIGITS = 5


class RoutingLog(Listener):
    """Appends to `routing.jsonl` in each job's folder. A resumed run drops what it repeats."""

    def __init__(self) -> None:
        self._every: dict[str, int] = {}

    def started(self, trainer: Trainer) -> None:
        for runner in trainer.runners:
            self.joined(trainer, runner)

    def joined(self, trainer: Trainer, runner: JobRunner) -> None:
        if trainer.out is not None:
            keep_until(trainer.folder(runner.job) / ROUTING, runner.state.step)

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if trainer.out is None or self._every.get(event.job) == 0:
            return
        if trainer.team is not None and trainer.handle.dispatch.last is None:
            return  # another process ran this job's micro-batches
        last = event.step == event.num_steps
        if event.job in self._every and not last and event.step % self._every[event.job]:
            return
        stats = router_stats(trainer.handle.routing(event.job))
        every = self._every.setdefault(event.job, log_period(stats, event.num_steps))
        if not stats or (event.step % every and not last):
            return
        runner = next(runner for runner in trainer.runners if runner.job.name == event.job)
        path = trainer.folder(runner.job) / ROUTING
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(routing_row(event.step, stats), separators=(",", ":")) + "\n")

    def finished(self, trainer: Trainer, results: Sequence[JobResult]) -> None:
        self._every.clear()


def routing_row(step: int, stats: Sequence[RouterStat]) -> dict[str, Any]:
    """One line of the file."""
    columns = list(dict.fromkeys(stat.columns for stat in stats))
    return {
        "step": step,
        "columns": [list(names) for names in columns],
        "routers": [
            {
                "path": stat.path,
                "layer": stat.layer,
                "when": stat.when,
                "columns": columns.index(stat.columns),
                "count": stat.count,
                "entropy": round(stat.entropy, DIGITS),
                "share": [round(value, DIGITS) for value in stat.share],
                "pairs": _pairs(stat),
            }
            for stat in stats
        ],
    }


def _pairs(stat: RouterStat) -> list[list[Any]]:
    """The commonest pairs [i, j, share], commonest first; empty for a router that uses everything."""
    if stat.pairs is None:
        return []
    table = stat.pairs.triu(1)
    value, place = table.flatten().sort(descending=True, stable=True)
    width = table.shape[1]
    found = zip(place[:MAX_PAIRS].tolist(), value[:MAX_PAIRS].tolist(), strict=True)
    return [[at // width, at % width, round(share, DIGITS)] for at, share in found if share > 0]


def log_period(stats: Sequence[RouterStat], num_steps: int) -> int:
    """Steps between lines; 0 where there is no router."""
    numbers = sum(len(stat.share) + min(MAX_PAIRS, len(stat.share) ** 2 // 2) for stat in stats)
    if numbers == 0:
        return 0
    lines = min(MAX_LINES, max(8, MAX_NUMBERS // numbers))
    return max(1, math.ceil(num_steps / lines))


def keep_until(path: Path, last: int, key: str = "step") -> None:
    """Drop the lines after number `last` of this key, and a last one that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row[key] > last:
            break
        kept.append(line + "\n")
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
