"""Row gates: a learned factor per rank row, folded into A, that follows the rows when they are edited.

Why it must be asked: a factor may depend on all rows of its site (a softmax over ranks), so moving its scores alone
could change what rows that stayed are worth.

Letters: R rank rows of a site before an edit, S after it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from loramux.core.bank import gather_rows


class RowGate(nn.Module):
    """forward() gives the factors [R]. Its parameters hold one score per row."""

    def forward(self) -> Tensor:
        raise NotImplementedError("a row gate must define forward() -> [R]")

    def gather(self, take_S: Tensor) -> Mapping[str, Tensor]:
        """What its parameters and buffers are for rows in this order (-1: a fresh row), by name. Changes nothing.

        Here: the same scores in another order, 0 for fresh rows, buffers as they are.
        """
        return {name: gather_rows(p.detach(), take_S) for name, p in self.named_parameters()}


def moved_gate(gate: nn.Module, take_S: Tensor) -> Mapping[str, Tensor]:
    """`gate.gather`, or an error for gates that cannot follow."""
    if not isinstance(gate, RowGate):
        raise ValueError(
            f"{type(gate).__name__} cannot follow its rows; derive it from core.rowgate.RowGate"
        )
    return gate.gather(take_S)
