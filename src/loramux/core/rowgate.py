"""Row gates: a learned factor per rank row, folded into A, that follows the rows when they are edited.

Why it must be asked: a factor may depend on all rows of its site (a softmax over ranks), so moving its scores alone
could change what rows that stayed are worth.

Letters: R rank rows of a site before an edit, S after it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class RowGate(nn.Module):
    """forward() gives the factors [R]. Its parameters hold one score per row."""

    def forward(self) -> Tensor:
        raise NotImplementedError("a row gate must define forward() -> [R]")

    def gather(self, take_S: Tensor) -> Mapping[str, Tensor]:
        """What its parameters and buffers are for rows in this order (-1: a fresh row), by name. Changes nothing.

        Here: the same scores in another order, 0 for fresh rows, buffers as they are.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            moved = parameter.new_zeros(len(take_S), *parameter.shape[1:])
            moved[take_S >= 0] = parameter.detach()[take_S[take_S >= 0]]
            found[name] = moved
        return found


@torch.no_grad()
def follow(gate: nn.Module, take_S: Tensor) -> None:
    """Let a gate follow its rows where no optimizer knows of it."""
    for name, value in moved_gate(gate, take_S).items():
        holder, _, leaf = name.rpartition(".")
        module = gate.get_submodule(holder)
        old = getattr(module, leaf)
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, leaf, nn.Parameter(value, old.requires_grad) if is_parameter else value)


def moved_gate(gate: nn.Module, take_S: Tensor) -> Mapping[str, Tensor]:
    """`gate.gather`, or an error for gates that cannot follow."""
    if not isinstance(gate, RowGate):
        raise ValueError(
            f"{type(gate).__name__} cannot follow its rows; derive it from core.rowgate.RowGate"
        )
    return gate.gather(take_S)
