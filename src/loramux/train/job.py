"""One job: what is asked for (`Job`, never changes) and how far it has come (`JobState`, what a checkpoint holds).

Why apart: two runs of the same `Job` must end in the same bits, so everything a run adds up lies in one place that
can be written down and read back. Nothing here depends on other jobs or on the clock.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loramux.data import Example, plan_batches
from loramux.recipe import TrainingConfig

Status = Literal["running", "finished", "stopped_early", "failed", "cancelled"]


@dataclass(frozen=True, eq=False)
class Job:
    """Trains the adapter called `name` on the handle; `seed` fixes data order, dropout and all other chance.

    packing: several examples share a row of at most `sequence_len` tokens (default: the longest example).
    priority: among jobs that are trained together, the higher one goes first.
    """

    name: str
    train: Sequence[Example]
    training: TrainingConfig
    validation: Sequence[Example] = ()
    seed: int = 0
    pad_token_id: int = 0
    packing: bool = False
    sequence_len: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        training = self.training
        if not self.train:
            raise ValueError(f"job {self.name!r} has no training examples")
        if (training.steps is None) == (training.epochs is None):
            raise ValueError(f"job {self.name!r}: give exactly one of steps and epochs")
        if training.early_stopping_patience and not (training.eval_every and self.validation):
            raise ValueError(
                f"job {self.name!r}: early_stopping_patience counts validations; "
                "it needs validation data and eval_every"
            )
        if training.eval_every and not self.validation:
            raise ValueError(f"job {self.name!r}: eval_every needs validation data")

    def plan(self) -> list[list[int]]:
        """Indices of the examples of every micro-batch, from first to last."""
        training = self.training
        steps = training.steps
        return plan_batches(
            [len(example) for example in self.train],
            training.micro_batch_size,
            seed=self.seed,
            epochs=training.epochs,
            num_batches=None if steps is None else steps * training.gradient_accumulation_steps,
            group_by_length=training.group_by_length,
        )

    def num_steps(self, plan: Sequence[Sequence[int]]) -> int:
        return math.ceil(len(plan) / self.training.gradient_accumulation_steps)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it, as plain JSON values."""
        training = self.training.model_dump(mode="json")
        training.pop("save_every")  # when states are written does not change what is trained
        return {
            "training": training,
            "seed": self.seed,
            "packing": self.packing,
            "sequence_len": self.sequence_len if self.packing else None,
            "data": {
                "train": examples_digest(self.train),
                "validation": examples_digest(self.validation),
            },
        }


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the tasks, token ids and loss masks, in order."""
    state = hashlib.sha256()
    for example in examples:
        task = example.task.encode()
        state.update(array("q", [len(task)]).tobytes())
        state.update(task)
        state.update(array("q", [len(example), *example.input_ids]).tobytes())
        state.update(bytes(example.loss_mask))
    return state.hexdigest()


@dataclass
class JobState:
    """How far a job is.

    best_loss / best_step: the lowest validation loss; num_bad: validations since then.
    window: (loss, aux) of the steps since the last history row.
    edits: what the adapter's controller did so far; control: what it needs to go on (see train/control.py).
    seconds: time spent in steps, over all runs of the job; in no history, since it never repeats.
    """

    step: int = 0
    tokens: int = 0
    status: Status = "running"
    reason: str = ""
    best_loss: float | None = None
    best_step: int = 0
    num_bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    window: list[list[float]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> JobState:
        return cls(**saved)
