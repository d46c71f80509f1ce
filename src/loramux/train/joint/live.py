"""The jobs of a joint run as a table that is drawn anew: while it trains, and for `loramux jobs --watch`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener
from loramux.train.joint.table import rows, totals
from loramux.train.progress import PlainProgress, clock

if TYPE_CHECKING:
    from loramux.train.trainer import JobResult, Trainer

PER_SECOND = 1
FRAME = 8  # lines of a table that are no job's
STYLES = {
    "running": "green",
    "paused": "yellow",
    "held": "yellow",
    "failed": "red",
    "cancelled": "yellow",
    "finished": "dim",
    "stopped_early": "dim",
}
TOTAL_SECONDS = 30.0  # between lines about all jobs, where there is no terminal


def make_live() -> Listener:
    """The table on a terminal, plain lines where standard error is a file or a pipe."""
    from rich.console import Console

    console = Console(stderr=True)
    return LiveJobs(console) if console.is_terminal else PlainJobs()


class LiveJobs(Listener):
    """A row per job and a line for all of them, drawn by a thread that only reads."""

    def __init__(self, console: Any):
        self.console = console
        self._live: Any = None
        self._moved: list[logging.StreamHandler[Any]] = []

    def started(self, trainer: Trainer) -> None:
        from rich.live import Live

        def draw() -> Any:
            run: Any = trainer
            return jobs_table(rows(run), totals(run), self.console.height)

        self._live = Live(get_renderable=draw, console=self.console, refresh_per_second=PER_SECOND)
        before = sys.stderr
        self._live.start()
        # Rich stands in for sys.stderr now; a handler that kept the old one would write into the table.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
                self._moved.append(handler)

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        if reason and status != "failed":  # the log has said that one
            self.console.print(f"{job}: {status}, {reason}", markup=False)

    def finished(self, trainer: Trainer, results: Sequence[JobResult]) -> None:
        if self._live is not None:
            self._live.stop()
        while self._moved:
            self._moved.pop().setStream(sys.stderr)


class PlainJobs(PlainProgress):
    """Lines per job, and one for all of them now and then."""

    def __init__(self, stream: Any = None):
        super().__init__(stream)
        self._told = 0.0

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        if status != "failed":  # the log has said that one, with its reason
            super().stopped(trainer, job, status, reason)

    def rounded(self, trainer: Trainer) -> None:
        run: Any = trainer
        every = totals(run)
        if every["elapsed_s"] - self._told > TOTAL_SECONDS:
            self._told = every["elapsed_s"]
            self._write(totals_line(every))


def jobs_table(jobs: Sequence[Mapping[str, Any]], run: Mapping[str, Any], height: int = 0) -> Any:
    """A rich table. height: of the terminal; jobs that have ended give way where it cannot hold all of them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = _fitting(jobs, height)
    table = Table(box=None, pad_edge=False, padding=(0, 1), expand=False)
    for name in ("job", "status"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=6)
    for name in ("step", "loss", "tok/s", "share", "memory", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason", overflow="ellipsis", no_wrap=True, ratio=1)
    for job in shown:
        style = STYLES.get(str(job.get("status")), "")
        cells = [str(job.get("job")), str(job.get("status") or "-"), *_numbers(job)]
        cells.append(str(job.get("reason") or ""))
        table.add_row(*(Text(cell, style=style if i == 1 else "") for i, cell in enumerate(cells)))
    more = len(jobs) - len(shown)
    lines: list[Any] = [table, Text(totals_line(run), style="bold")]
    if more:
        lines.insert(1, Text(f"and {more} more, ended or waiting", style="dim"))
    return Group(*lines)


def _fitting(jobs: Sequence[Mapping[str, Any]], height: int) -> list[Mapping[str, Any]]:
    room = max(1, height - FRAME) if height else len(jobs)
    if len(jobs) <= room:
        return list(jobs)
    first = {"running": 0, "failed": 1, "paused": 2}
    order = sorted(range(len(jobs)), key=lambda i: (first.get(str(jobs[i].get("status")), 3), i))
    return [jobs[i] for i in sorted(order[:room])]


def _numbers(job: Mapping[str, Any]) -> list[str]:
    loss, speed, share, left = (
        job.get(key) for key in ("loss", "tokens_per_second", "share", "left_s")
    )
    return [
        f"{_or_dash(job.get('step'))}/{_or_dash(job.get('steps'))}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if speed is None else f"{speed:,.0f}",
        "-" if share is None else f"{100 * share:.0f} %",
        size(job.get("memory")),
        "-" if left is None else clock(left),
    ]


def totals_line(run: Mapping[str, Any]) -> str:
    """`8 jobs: 6 running, 2 finished | round 12 | 1,234 tok/s | padding 3 % | 0:42`."""
    counts = ", ".join(f"{count} {status}" for status, count in run["jobs"].items())
    said = [f"{sum(run['jobs'].values())} jobs: {counts}", f"round {run['round']}"]
    if run.get("tokens_per_second"):
        said.append(f"{run['tokens_per_second']:,.0f} tok/s")
    if run.get("padding") is not None:
        said.append(f"padding {100 * run['padding']:.0f} %")
    if run.get("elapsed_s") is not None:
        said.append(clock(run["elapsed_s"]))
    if run.get("left_s"):
        said.append(f"{clock(run['left_s'])} left")
    return " | ".join(said)


def size(number: float | None) -> str:
    """Bytes for people: `12.3 MiB`."""
    if number is None:
        return "-"
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {letter}"
    return f"{number:.0f} B"


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
