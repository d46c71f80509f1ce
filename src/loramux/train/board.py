"""TensorBoard files of a run: losses, learning rate, speed, what the routers do, and where ranks go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.train.edits import edit_metrics
from loramux.train.events import Listener, StepEvent
from loramux.train.metrics import router_metrics

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner
    from loramux.train.trainer import JobResult, Trainer

# Shares are a curve per layer and expert: hundreds of numbers, written less often than the losses.
SHARE_STEPS = 10
FEW_ROUTERS = 64  # of more, a router at every linear, even the summaries take a tenth of a second


class TensorBoard(Listener):
    """Writes into `folder`, one sub-folder per job where there are several. A resumed run hides what it repeats."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writers: dict[str, Any] = {}

    def started(self, trainer: Trainer) -> None:
        for runner in trainer.runners:
            self._open(runner, self.folder if trainer.out_is_one else self.folder / runner.job.name)

    def joined(self, trainer: Trainer, runner: JobRunner) -> None:
        self._open(runner, self.folder / runner.job.name)

    def _open(self, runner: JobRunner, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = runner.state.step + 1 if runner.state.step else None
        self._writers[runner.job.name] = SummaryWriter(str(folder), purge_step=purge)

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if not event.is_logged:
            return
        values = {
            "train/loss": event.loss,
            "train/aux": event.aux,
            "train/learning_rate": event.lr,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
        } | {f"train/{name}": value for name, value in event.figures.items()}
        shares = event.step % SHARE_STEPS == 0 or event.step in (1, event.num_steps)
        records = trainer.handle.routing(event.job)
        if shares or len(records) <= FEW_ROUTERS:
            values |= router_metrics(records, shares=shares)
        for name, value in values.items():
            self._writers[event.job].add_scalar(name, value, event.step)

    def edited(self, trainer: Trainer, job: str, rows: Sequence[Mapping[str, Any]]) -> None:
        steps: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            steps.setdefault(int(row["step"]), []).append(row)
        for step, own in steps.items():
            for name, value in edit_metrics(own).items():
                self._writers[job].add_scalar(name, value, step)

    def validated(self, trainer: Trainer, job: str, step: int, loss: float, is_best: bool) -> None:
        self._writers[job].add_scalar("validation/loss", loss, step)
        self._writers[job].flush()

    def finished(self, trainer: Trainer, results: Sequence[JobResult]) -> None:
        for writer in self._writers.values():
            writer.close()
