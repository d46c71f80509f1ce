"""Concatenation: sum_i w_i s_i B_i^T A_i exactly, at the sum of the ranks.

    A = [w_1 s_1 A_1; ...; w_N s_N A_N]    B = [B_1; ...; B_N]    scale 1

The same function as the weighted sum of the adapters' outputs ("ensemble of outputs" in several papers); with weights
1/N it is NLA. Any ranks; a linear that only some adapters have holds only their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.compose.algebra import stack
from loramux.compose.parts import Merged, Merger, Part


@dataclass(frozen=True, kw_only=True)
class CatOptions:
    """Nothing to choose: the rank is what it is."""


def merge(parts: Sequence[Part], options: CatOptions, seed: int) -> Merged:
    return Merged(*stack(parts))


MERGER = Merger("cat", "Concatenation", "", "sum of ranks", merge, CatOptions)
