"""What a job minimises. Fine-tuning's cross-entropy is here; `preference.py` has another one.

Why an object: the trainers, solo and joint, only add up shares of a step. How rows become units, what a unit weighs and
how logits become a loss is the objective's.

Letters: S supervised positions, V vocabulary, K figures beside the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramux.core.batch import supervised_share
from loramux.data import Example
from loramux.train.loss import sum_losses

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.train.job import Job
    from loramux.train.loss import SupervisedForward

Tensors = dict[str, Tensor]


class Objective:
    """Cross-entropy, a mean over the supervised tokens of a step.

    figures: names of the numbers that come with the loss, each a mean over the step too.
    """

    figures: tuple[str, ...] = ()

    def weight(self, examples: Sequence[Example]) -> int:
        """What the summed loss of these rows is divided by."""
        return sum(example.num_supervised for example in examples)

    def share(self, batch: Mapping[str, Any], total: int) -> float | Tensor:
        """How much of a step of weight `total` a micro-batch is: auxiliary losses are weighted by it."""
        return supervised_share({"labels": batch["labels"], "num_items_in_batch": total})

    def complete(self, batch: dict[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
        """The collated batch with whatever else the loss needs."""
        return batch

    def loss(
        self, batch: Mapping[str, Any], logits_SV: Tensor, target_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum over the batch, sums of the figures [K])."""
        return sum_losses(logits_SV, target_S), logits_SV.new_zeros(0)

    def batches(self, rows: Sequence[Example], size: int) -> Iterator[list[Example]]:
        """Rows for a validation, those of like length together."""
        ordered = sorted(rows, key=len)
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def tensors(self) -> Tensors:
        """What a resumed job needs of it."""
        return {}

    def restore(self, saved: Mapping[str, Tensor]) -> None: ...


def objective_of(job: Job, handle: Handle, forward: SupervisedForward) -> Objective:
    """The objective of a job, ready for its first step."""
    if job.objective is None:
        return Objective()
    from loramux.train.preference import Preference

    return Preference(job.name, job.objective, handle, forward)


def means_of(loss: Tensor, aux: Tensor, figures_K: Tensor) -> Tensor:
    """[loss, auxiliary loss, figures...] of a micro-batch, to be added up over a step."""
    return torch.cat([torch.stack([loss, aux.to(loss.dtype)]), figures_K.to(loss.dtype)])
