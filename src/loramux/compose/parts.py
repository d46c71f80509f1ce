"""What a merging method sees of one linear: the rows of every adapter that has it.

Why a type of its own: methods work per linear, know no files, and all of them give factors whose scale is 1.

Letters: R rank rows, I input width, O output width. One adapter changes the linear by s B^T A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

WIDE = torch.float64  # of factors while they are merged; results are saved in fp32


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter at one linear, in fp64, rank-major. `weight` is the user's, the merge's own factor included."""

    a: Tensor  # [R, I]
    b: Tensor  # [R, O]
    scale: float
    weight: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged factors, scale 1.

    error: what cutting to this rank lost, as the Frobenius norm relative to what the method gives at full rank;
    0 where nothing was cut, None where the method has no such target.
    """

    a: Tensor  # [R, I]
    b: Tensor  # [R, O]
    error: float | None = 0.0

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def times(self, factor: float) -> Merged:
        """The merged change times a number; it goes on B."""
        return self if factor == 1 else Merged(self.a, factor * self.b, self.error)


Merge = Callable[[Sequence[Part], Any, int], Merged]


@dataclass(frozen=True)
class Merger:
    """A merging method.

    merge      gives the merged rows of one linear from its parts, the options and a seed of that linear
    options    frozen dataclass of what can be set; its defaults are the method's
    weights    what an adapter weighs when nobody says: "one", or "mean" for 1/N
    signed     whether a weight may be negative
    searches   whether the weights come from a search on few-shot rows (then a base and data are needed)
    sums       whether the result stands for the weighted sum, so that its distance from that sum says something
    """

    name: str
    title: str
    paper: str
    rank: str  # of the result, in words
    merge: Merge
    options: type[Any]
    weights: Literal["one", "mean"] = "mean"
    signed: bool = True
    searches: bool = False
    sums: bool = True


def default_rank(parts: Sequence[Part], rank: int | None) -> int:
    """The rank asked for, or the largest of the inputs."""
    return max(part.rank for part in parts) if rank is None else rank
