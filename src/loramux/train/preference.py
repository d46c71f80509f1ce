"""Direct preference optimisation: a chosen answer is to gain likelihood over a rejected one, measured by a reference.

    delta   = (log p(chosen) - log p(rejected)) - (log ref(chosen) - log ref(rejected))
    sigmoid   -(1 - e) log sigma(beta delta) - e log sigma(-beta delta)      Rafailov et al. 2023; e: label smoothing
    ipo       (delta - 1 / (2 beta))^2                                       Azar et al. 2023
    reward    beta (log p - log ref), of each answer

log p is a sum over the supervised tokens of an answer. The reference is the base without adapters, or a frozen adapter.

Letters: B rows (chosen, rejected by turns), P pairs, S supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from loramux.data import Example
from loramux.data.pairs import PER_PAIR
from loramux.recipe import DpoConfig
from loramux.train.objective import Objective, Tensors
from loramux.train.references import BASE, References, row_log_probs

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.train.loss import SupervisedForward

REFERENCE = "reference"  # key of a batch: log-probability of every row under the reference


class Preference(Objective):
    """The loss of a job whose rows come two by two; a mean over the pairs of a step."""

    figures = ("accuracy", "margin", "reward_chosen", "reward_rejected")

    def __init__(self, job: str, config: DpoConfig, handle: Handle, forward: SupervisedForward):
        self.config = config
        name = None if config.reference == BASE else config.reference
        self.references = References(job, name, handle, forward)

    def weight(self, examples: Sequence[Example]) -> int:
        return len(examples) // PER_PAIR

    def share(self, batch: Mapping[str, Any], total: int) -> float | Tensor:
        return int(batch["labels"].shape[0]) // PER_PAIR / total

    def complete(self, batch: dict[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
        return {**batch, REFERENCE: self.references.of(batch, examples)}

    def loss(
        self, batch: Mapping[str, Any], logits_SV: Tensor, target_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_B = row_log_probs(logits_SV, target_S, batch["labels"])
        reference_B = batch[REFERENCE].to(log_B.device, log_B.dtype)
        loss_P = pair_losses(self.config, log_B, reference_B)
        reward_PC = self.config.beta * (log_B.detach() - reference_B).view(-1, PER_PAIR)
        margin_P = reward_PC[:, 0] - reward_PC[:, 1]
        figures = [(margin_P > 0).to(log_B.dtype), margin_P, reward_PC[:, 0], reward_PC[:, 1]]
        return loss_P.sum(), torch.stack([figure.sum() for figure in figures])

    def batches(self, rows: Sequence[Example], size: int) -> Iterator[list[Example]]:
        pairs = [rows[i : i + PER_PAIR] for i in range(0, len(rows), PER_PAIR)]
        ordered = sorted(pairs, key=lambda pair: max(map(len, pair)))
        for start in range(0, len(ordered), size):
            yield [row for pair in ordered[start : start + size] for row in pair]

    def tensors(self) -> Tensors:
        return self.references.tensors()

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        self.references.restore(saved)


def pair_losses(config: DpoConfig, log_B: Tensor, reference_B: Tensor) -> Tensor:
    """The loss [P] of every pair, from the log-probabilities of chosen and rejected rows by turns."""
    ratio_PC = (log_B - reference_B).view(-1, PER_PAIR)
    delta_P = ratio_PC[:, 0] - ratio_PC[:, 1]
    if config.loss_type == "ipo":
        return (delta_P - 1 / (2 * config.beta)) ** 2
    logit_P = config.beta * delta_P
    right, wrong = functional.logsigmoid(logit_P), functional.logsigmoid(-logit_P)
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong
