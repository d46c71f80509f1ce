"""One job's part in a round: the optimizer step it is taking, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from loramux.core.state import State
from loramux.data import Example
from loramux.errors import DataError
from loramux.train.joint.forward import Outcome, Part
from loramux.train.loss import num_tokens
from loramux.train.objective import means_of
from loramux.train.runner import JobRunner


class StepWork:
    """Gathers the gradients of a step; `finish` lets the job use them."""

    def __init__(self, runner: JobRunner, examples: Sequence[Sequence[Example]], vocab: int | None):
        self.runner = runner
        self.examples = examples
        self.vocab = vocab
        self.mine: Container[int] | None = None  # micro-batches that this process runs; None: all
        self.total = sum(runner.objective.weight(part) for part in examples)
        self.sums: Tensor = runner.no_sums()
        self.tokens = 0
        self.seconds = 0.0
        self.is_dropped = False  # taken out of this round, for want of memory
        self.last: State | None = None  # the forward pass that listeners may look at

    @property
    def is_alive(self) -> bool:
        return self.runner.is_running and not self.is_dropped

    def runs(self, number: int) -> bool:
        """Whether micro-batch `number` is there, and this process's to run."""
        return number < len(self.examples) and (self.mine is None or number in self.mine)

    def part(self, number: int) -> Part:
        """Micro-batch `number`, collated and checked: in a shared call a bad row would be everybody's error."""
        batch = self.runner.collate(self.examples[number])
        largest = int(batch["input_ids"].max())
        if self.vocab is not None and not (
            largest < self.vocab and int(batch["input_ids"].min()) >= 0
        ):
            raise DataError(
                f"token id {largest} is outside the base's vocabulary of {self.vocab}; encode the rows with its own "
                "tokenizer"
            )
        objective = self.runner.objective
        batch = objective.complete(batch, self.examples[number])
        return Part(
            self.runner.job.name,
            batch,
            self.total,
            self.runner.parameters,
            self.runner.rng_of(number),
            objective,
        )

    def take(self, batch: Mapping[str, Any], outcome: Outcome, seconds: float) -> None:
        """Add what came of one micro-batch."""
        for parameter, grad in zip(self.runner.parameters.values(), outcome.grads, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad.add_(grad)
        self.sums += means_of(outcome.loss, outcome.aux, outcome.figures).to(self.sums.dtype)
        self.tokens += num_tokens(batch)
        self.seconds += seconds
        self.last = outcome.state


def step_shape(runner: JobRunner) -> tuple[int, int]:
    """(rows, length) of the largest micro-batch of the job's next step, padded; packed examples count as one row."""
    train = runner.job.train
    shapes = []
    for part in runner.next_micro_batches():
        lengths = [len(train[i]) for i in part]
        shapes.append((1, sum(lengths)) if runner.job.packing else (len(part), max(lengths)))
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0))
