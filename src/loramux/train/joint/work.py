"""One job's part in a round: the optimizer step it is taking, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loramux.core.state import State
from loramux.data import Example
from loramux.errors import DataError
from loramux.train.joint.forward import Outcome, Part
from loramux.train.loss import num_tokens
from loramux.train.runner import JobRunner


class StepWork:
    """Gathers the gradients of a step; `finish` lets the job use them."""

    def __init__(self, runner: JobRunner, examples: Sequence[Sequence[Example]], vocab: int | None):
        self.runner = runner
        self.examples = examples
        self.vocab = vocab
        self.total = sum(example.num_supervised for part in examples for example in part)
        self.sums: Tensor = torch.zeros(2, device=runner.device)
        self.tokens = 0
        self.seconds = 0.0
        self.last: State | None = None  # the forward pass that listeners may look at

    @property
    def is_alive(self) -> bool:
        return self.runner.is_running

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
        return Part(
            self.runner.job.name, batch, self.total, self.runner.parameters, self.runner.rng
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
        self.sums += torch.stack([outcome.loss, outcome.aux]).to(self.sums.dtype)
        self.tokens += num_tokens(batch)
        self.seconds += seconds
        self.last = outcome.state


def step_tokens(runner: JobRunner) -> int:
    """Tokens of the largest micro-batch of the job's next step, padding included."""
    train = runner.job.train
    sizes = [
        sum(len(train[i]) for i in part)
        if runner.job.packing
        else len(part) * max(len(train[i]) for i in part)
        for part in runner.next_micro_batches()
    ]
    return max(sizes, default=0)
