"""DARE on the products, summed: drop entries at random, scale up the rest, add.

Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099. With D_i = s_i B_i^T A_i:

    M_i ~ Bernoulli(density), one draw per entry     D = sum_i w_i M_i * D_i / density

The mean over seeds is the plain weighted sum. On A and B apart, as in PEFT's `dare_linear`, the variances of the two
factors multiply. The result is not low-rank: cut to rank k (default: the largest of the inputs), the error stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.compose.algebra import cut, dense
from loramux.compose.checks import check_density, check_rank
from loramux.compose.parts import Merged, Merger, Part, default_rank


@dataclass(frozen=True, kw_only=True)
class DareOptions:
    """density: the share of entries kept. 0.5 is ours; the paper drops up to 0.9 of full fine-tunes."""

    density: float = 0.5
    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_density(self.density)


def merge(parts: Sequence[Part], options: DareOptions, seed: int) -> Merged:
    total_OI: Tensor | None = None
    for part, kept_OI in zip(parts, dropped(parts, options.density, seed), strict=True):
        total_OI = part.weight * kept_OI if total_OI is None else total_OI + part.weight * kept_OI
    assert total_OI is not None
    return cut(total_OI, default_rank(parts, options.rank), seed)


def dropped(parts: Sequence[Part], density: float, seed: int) -> list[Tensor]:
    """Every product with entries dropped and the others divided by the density."""
    if density >= 1:
        return [dense(part) for part in parts]
    from peft.utils.merge_utils import random_pruning

    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(seed)
        return [random_pruning(dense(part), density, rescale=True) for part in parts]


MERGER = Merger(
    "dare_linear", "DARE, summed", "arXiv 2311.03099", "chosen; cut by SVD", merge, DareOptions
)
