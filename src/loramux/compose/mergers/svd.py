"""Truncated SVD of the weighted sum of the products: the best adapter of rank k there is, in the Frobenius norm.

    sum_i w_i s_i B_i^T A_i = U S V^T      B = U_k S_k,  A = V_k^T,  scale 1

By QR of the stacked factors, [B] = Q_b R_b and [A]^T = Q_a R_a, and the SVD of R_b R_a^T, which is as small as the sum
of the ranks. The error is the norm of the dropped singular values. k defaults to the largest rank of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.compose.algebra import best, stack
from loramux.compose.checks import check_rank
from loramux.compose.parts import Merged, Merger, Part, default_rank


@dataclass(frozen=True, kw_only=True)
class SvdOptions:
    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


def merge(parts: Sequence[Part], options: SvdOptions, seed: int) -> Merged:
    return best(*stack(parts), default_rank(parts, options.rank))


MERGER = Merger("svd", "Truncated SVD of the sum", "", "chosen", merge, SvdOptions)
