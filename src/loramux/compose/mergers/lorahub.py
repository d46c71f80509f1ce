"""LoraHub: one weight per adapter for a new task, found by a gradient-free search on a handful of examples.

Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition, COLM 2024, arXiv 2307.13269.

    A = sum_i w_i A_i,  B = sum_i w_i B_i     combine="factors": sum_ij w_i w_j s B_i^T A_j, quadratic in w
    sum_i w_i s_i B_i^T A_i                   combine="delta": ours, exact as `cat`, any ranks
    minimise  L(w) + 0.05 mean_i |w_i|,  w in [-1.5, 1.5]^N, from w = 0, 40 evaluations

L is the mean cross-entropy of the answers' tokens. loss_norm="lorahub" is the published code's: the mean losses of the
batches, summed and divided by the number of examples, which makes the second term as many times stronger as a batch has
examples. In "factors" w and -w are one model, and all adapters must have the same shapes and scale.
The search itself is in `compose/search.py`; this file only merges with the weights that it found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux.compose.algebra import stack
from loramux.compose.parts import Merged, Merger, Part
from loramux.core.values import check_not_negative, check_positive, check_whole


@dataclass(frozen=True, kw_only=True)
class LoraHubOptions:
    """budget, bound and penalty are the paper's. optimizer: "auto" takes nevergrad's NGOpt where it is installed."""

    combine: Literal["factors", "delta"] = "factors"
    budget: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    loss_norm: Literal["mean", "lorahub"] = "mean"
    optimizer: Literal["auto", "nevergrad", "es"] = "auto"

    def __post_init__(self) -> None:
        check_whole("budget", self.budget, least=0)
        check_positive("bound", self.bound)
        check_not_negative("penalty", self.penalty)
        for name, allowed in (
            ("combine", ("factors", "delta")),
            ("loss_norm", ("mean", "lorahub")),
            ("optimizer", ("auto", "nevergrad", "es")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


def merge(parts: Sequence[Part], options: LoraHubOptions, seed: int) -> Merged:
    """The merged rows for the parts' weights; "factors" has the cross terms, as published."""
    if options.combine == "delta":
        return Merged(*stack(parts))
    a_RI = sum((part.weight * part.a for part in parts[1:]), parts[0].weight * parts[0].a)
    b_RO = sum((part.weight * part.b for part in parts[1:]), parts[0].weight * parts[0].b)
    return Merged(a_RI, parts[0].scale * b_RO, None)


MERGER = Merger(
    "lorahub",
    "LoraHub",
    "arXiv 2307.13269",
    "that of the inputs; delta: sum",
    merge,
    LoraHubOptions,
    searches=True,
)
