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
from loramux.data.pairs import PER_PAIR, check_pairs
from loramux.recipe import DpoConfig, TrainingConfig

Status = Literal["running", "finished", "stopped_early", "failed", "cancelled"]


@dataclass(frozen=True, eq=False)
class Job:
    """Trains the adapter called `name` on the handle; `seed` fixes data order, dropout and all other chance.

    packing: several examples share a row of at most `sequence_len` tokens (default: the longest example).
    priority: among jobs that are trained together, the higher one goes first.
    objective: None is the cross-entropy of the supervised tokens. With a `DpoConfig` examples come two by two, chosen
    then rejected (`data.load_pairs`), a batch is counted in pairs, and `reference` is "base" or a frozen adapter on the
    handle.
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
    objective: DpoConfig | None = None

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
        if self.objective is not None:
            if self.packing:
                raise ValueError(f"job {self.name!r}: pairs are not packed; set packing=False")
            check_pairs(self.train, f"job {self.name!r}, training")
            check_pairs(self.validation, f"job {self.name!r}, validation")

    @property
    def rows_per_unit(self) -> int:
        """Examples that stay together in a batch."""
        return 1 if self.objective is None else PER_PAIR

    @property
    def num_units(self) -> int:
        """What an epoch goes through: examples, or pairs of them."""
        return len(self.train) // self.rows_per_unit

    def plan(self) -> list[list[int]]:
        """Indices of the examples of every micro-batch, from first to last."""
        training, num = self.training, self.rows_per_unit
        steps = training.steps
        units = [range(i, i + num) for i in range(0, len(self.train), num)]
        plan = plan_batches(
            [max(len(self.train[i]) for i in unit) for unit in units],
            training.micro_batch_size,
            seed=self.seed,
            epochs=training.epochs,
            num_batches=None if steps is None else steps * training.gradient_accumulation_steps,
            group_by_length=training.group_by_length,
        )
        return [[i for place in batch for i in units[place]] for batch in plan]

    def num_steps(self, plan: Sequence[Sequence[int]]) -> int:
        return math.ceil(len(plan) / self.training.gradient_accumulation_steps)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it, as plain JSON values."""
        training = self.training.model_dump(mode="json")
        training.pop("save_every")  # when states are written does not change what is trained
        training.pop("offload_activations")  # nor does where activations wait
        if self.training.stop is None:
            training.pop("stop")
        # Absent where there is none: runs from before there were objectives go on.
        own = {} if self.objective is None else {"objective": self.objective.model_dump()}
        return {
            **own,
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
    stopping: what is kept of the losses where hopeless jobs are stopped (see train/stopping.py).
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
    stopping: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> JobState:
        return cls(**saved)
