"""What happens during training, for those who watch: displays, logs, a caller's own code.

A listener reads; it never changes what is trained, so runs with and without listeners end in the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner
    from loramux.train.trainer import JobResult, Trainer


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step of one job. `loss` is the mean over its supervised tokens, without the auxiliary losses.

    tokens_per_second counts real tokens (no padding) over the last steps. is_logged: the step ends a history row.
    figures: what the job's objective tells beside its loss (of DPO: accuracy, margin, rewards).
    """

    job: str
    step: int
    num_steps: int
    loss: float
    aux: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    is_logged: bool
    figures: Mapping[str, float] = field(default_factory=dict)


class Listener:
    """Override what you need. Called on the training thread: be quick.

    Between `stepped` and the next model call `trainer.handle.routing(event.job)` shows how this step's last micro-batch
    was routed.
    """

    def started(self, trainer: Trainer) -> None:
        """Before the first step; on a resumed run the jobs already stand at their steps."""

    def joined(self, trainer: Trainer, runner: JobRunner) -> None:
        """A job was added to a run that had started."""

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        """After every optimizer step of every job."""

    def edited(self, trainer: Trainer, job: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """After a step in which the job's controller edited ranks: what it did, {"step", "what", "site", ...} each."""

    def validated(self, trainer: Trainer, job: str, step: int, loss: float, is_best: bool) -> None:
        """After every validation."""

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        """A job is done, for whatever reason."""

    def rounded(self, trainer: Trainer) -> None:
        """After every round: each job that was to take a step has taken it, or has failed at it."""

    def finished(self, trainer: Trainer, results: Sequence[JobResult]) -> None:
        """After the last step of the last job, also when the run was interrupted or raised."""
