"""What a person sees while training, on standard error: live bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener, StepEvent

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner
    from loramux.train.trainer import JobResult, Trainer

PLAIN_SHARE, PLAIN_SECONDS = 0.1, 10.0


def make_progress() -> Listener:
    """The live display on a terminal, plain lines where standard error is a file or a pipe."""
    from rich.console import Console

    console = Console(stderr=True)
    return LiveProgress(console) if console.is_terminal else PlainProgress()


class LiveProgress(Listener):
    """One bar per job with step, loss, learning rate, speed, time left and validation loss."""

    def __init__(self, console: Any):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._validation: dict[str, str] = {}

    def started(self, trainer: Trainer) -> None:
        for runner in trainer.runners:
            self._show(runner, "training" if trainer.out_is_one else runner.job.name)
        self.progress.start()

    def joined(self, trainer: Trainer, runner: JobRunner) -> None:
        self._show(runner, runner.job.name)

    def _show(self, runner: JobRunner, title: str) -> None:
        name = runner.job.name
        self._tasks[name] = self.progress.add_task(
            title, total=runner.num_steps, completed=runner.state.step, numbers=""
        )
        best = runner.state.best_loss
        self._validation[name] = "" if best is None else f"val {best:.4f}"

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        numbers = f"{_numbers(event)}  {self._validation[event.job]}"
        self.progress.update(self._tasks[event.job], completed=event.step, numbers=numbers)

    def validated(self, trainer: Trainer, job: str, step: int, loss: float, is_best: bool) -> None:
        self._validation[job] = f"val {loss:.4f}"

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        if reason:
            self.progress.console.print(f"{job}: {status}, {reason}", markup=False)

    def finished(self, trainer: Trainer, results: Sequence[JobResult]) -> None:
        self.progress.stop()


class PlainProgress(Listener):
    """A line per job after a tenth of its steps or ten seconds, and at the first and last step."""

    def __init__(self, stream: Any = None):
        self.stream = stream
        self._last: dict[str, tuple[int, float]] = {}
        self._validation: dict[str, str] = {}
        self._started: dict[str, tuple[int, float]] = {}

    def started(self, trainer: Trainer) -> None:
        for runner in trainer.runners:
            self.joined(trainer, runner)

    def joined(self, trainer: Trainer, runner: JobRunner) -> None:
        self._started[runner.job.name] = (runner.state.step, time.monotonic())

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        now = time.monotonic()
        if event.job in self._last and event.step != event.num_steps:
            step, at = self._last[event.job]
            few = event.step - step < PLAIN_SHARE * event.num_steps
            if few and now - at < PLAIN_SECONDS:
                return
        self._last[event.job] = (event.step, now)
        from_step, since = self._started[event.job]
        left = (now - since) / (event.step - from_step) * (event.num_steps - event.step)
        self._write(
            f"{event.job}: step {event.step}/{event.num_steps}  {_numbers(event)}  {clock(left)} left"
        )

    def validated(self, trainer: Trainer, job: str, step: int, loss: float, is_best: bool) -> None:
        self._write(f"{job}: step {step}  validation loss {loss:.4f}{' (best)' if is_best else ''}")

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        self._write(f"{job}: {status}{', ' if reason else ''}{reason}")

    def _write(self, line: str) -> None:
        stream = self.stream if self.stream is not None else sys.stderr
        stream.write(line + "\n")
        stream.flush()


def _numbers(event: StepEvent) -> str:
    aux = f"  aux {event.aux:.4f}" if event.aux else ""
    return f"loss {event.loss:.4f}{aux}  lr {event.lr:.1e}  {event.tokens_per_second:,.0f} tok/s"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
