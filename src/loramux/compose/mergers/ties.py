"""TIES on the products: trim, elect a sign per entry, average the adapters that agree with it.

Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv 2306.01708. With
D_i = s_i B_i^T A_i:

    T_i = D_i where |D_i| is among the `density` largest, else 0
    e   = sign(sum_i T_i), + where the sum is 0          sign="frequency": of the sum of signs
    D   = sum over i with sign(T_i) = e of w_i T_i, divided by how many they are (at least 1)

The weights do not vote and the division is by the count, as in PEFT. The paper trims over the whole model, this and
PEFT per linear. Running it on A and B apart, as PEFT's `ties` does, elects signs of numbers that mean nothing alone.
The result is not low-rank: it is cut to rank k (default: the largest of the inputs) and the error is stated.

Letters: N adapters, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from loramux.compose.algebra import cut, dense
from loramux.compose.checks import check_density, check_rank
from loramux.compose.parts import Merged, Merger, Part, default_rank

Array = np.ndarray[Any, np.dtype[np.float32]]
Sign = Literal["total", "frequency"]
BLOCK = 2**16  # entries
SAMPLE = 2**16  # entries


@dataclass(frozen=True, kw_only=True)
class TiesOptions:
    """density: the share of entries kept, the paper's default."""

    density: float = 0.2
    rank: int | None = None
    sign: Sign = "total"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_density(self.density)
        if self.sign not in ("total", "frequency"):
            raise ValueError(f"sign must be 'total' or 'frequency', got {self.sign!r}")


def merge(parts: Sequence[Part], options: TiesOptions, seed: int) -> Merged:
    deltas = [dense(part) for part in parts]
    least = [threshold(delta, options.density) for delta in deltas]
    merged_OI = agree(deltas, [part.weight for part in parts], options.sign, least)
    return cut(merged_OI, default_rank(parts, options.rank), seed)


def threshold(delta_OI: Tensor, density: float) -> float:
    """The magnitude of the last of the int(density * numel) largest entries: what equals it is kept too.

    As PEFT's `magnitude_based_pruning` but for such ties, by selection instead of its sort.
    """
    if density >= 1:
        return 0.0
    size_P = delta_OI.abs().reshape(-1).numpy()
    count = int(density * size_P.size)
    if count < 1:
        raise ValueError(
            f"density {density} keeps none of {size_P.size} entries; raise it to at least {1 / size_P.size:.2g}"
        )
    return _largest(size_P, count)


def _largest(size_P: Array, count: int) -> float:
    """The count-th largest number. A sample brackets it first, so that the selection runs over a few per cent.

    In numpy, whose comparisons and selections are several times faster here than torch's.
    """
    sample = np.sort(size_P[:: max(1, size_P.size // SAMPLE)])[::-1]
    at, margin = count / size_P.size * sample.size, 4 * sample.size**0.5
    high, low = (sample[min(max(int(i), 0), sample.size - 1)] for i in (at - margin, at + margin))
    above = int(np.count_nonzero(size_P > high))
    inside_P = size_P[(size_P >= low) & (size_P <= high)]
    if not 0 < count - above <= inside_P.size:  # the sample was no fair one
        above, inside_P = 0, size_P
    place = inside_P.size - (count - above)
    return float(np.partition(inside_P, place)[place])


def agree(
    deltas: Sequence[Tensor], weights: Sequence[float], sign: Sign, least: Sequence[float] = ()
) -> Tensor:
    """PEFT's sign election and disjoint mean, some rows at a time so that they stay in the processor's cache.

    least: entries smaller than this count as 0, one number per adapter.
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    weight_N11 = torch.tensor(list(weights), dtype=deltas[0].dtype).view(-1, 1, 1)
    out_OI = torch.empty_like(deltas[0])
    step = max(1, BLOCK // deltas[0].shape[1])
    for at in range(0, out_OI.shape[0], step):
        block_NOI = torch.stack([delta[at : at + step] for delta in deltas])
        for own_OI, size in zip(block_NOI, least, strict=False):
            own_OI.masked_fill_(own_OI.abs() < size, 0.0)
        mask_NOI = calculate_majority_sign_mask(block_NOI, method=sign)
        out_OI[at : at + step] = disjoint_merge(block_NOI.mul_(weight_N11), mask_NOI)
    return out_OI


MERGER = Merger(
    "ties",
    "TIES on the products",
    "arXiv 2306.01708",
    "chosen; cut by SVD",
    merge,
    TiesOptions,
    weights="one",
)
