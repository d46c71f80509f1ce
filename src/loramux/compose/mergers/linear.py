"""Linear merging of the products: sum_i w_i s_i B_i^T A_i.

Without `rank` this is `cat` and exact; with it, `svd`. It is not what PEFT calls `linear`, which adds the A and the B
apart with weights sqrt(w_i s_i): that gives sum_ij sqrt(w_i s_i w_j s_j) B_i^T A_j, whose terms with i != j are noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.compose.algebra import best, stack
from loramux.compose.checks import check_rank
from loramux.compose.parts import Merged, Merger, Part


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """rank: None keeps every rank, which is exact."""

    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


def merge(parts: Sequence[Part], options: LinearOptions, seed: int) -> Merged:
    a_RI, b_RO = stack(parts)
    return Merged(a_RI, b_RO) if options.rank is None else best(a_RI, b_RO, options.rank)


MERGER = Merger("linear", "Weighted sum of products", "", "sum of ranks", merge, LinearOptions)
