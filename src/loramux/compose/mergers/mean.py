"""The mean of the adapters' outputs with fixed weights: sum_i w_i s_i B_i^T A_i / sum_i w_i.

As `linear`, with weights that are brought to a sum of 1 first, per linear: where only some adapters have it, theirs
are. So an adapter that leaves a linear out does not dilute the others there, as it does under `linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loramux.compose.mergers.linear import LinearOptions
from loramux.compose.mergers.linear import merge as merge_linear
from loramux.compose.parts import Merged, Merger, Part


def merge(parts: Sequence[Part], options: LinearOptions, seed: int) -> Merged:
    total = sum(part.weight for part in parts)
    if abs(total) < 1e-12:
        raise ValueError(
            "the weights of a mean must not sum to 0; use 'linear' to subtract one adapter from another"
        )
    return merge_linear([replace(p, weight=p.weight / total) for p in parts], options, seed)


MERGER = Merger("mean", "Mean of outputs", "", "sum of ranks", merge, LinearOptions)
