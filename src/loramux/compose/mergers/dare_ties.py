"""DARE on the products, merged as TIES does: random drop in place of the magnitude trim, then signs and disjoint mean.

Yu et al., arXiv 2311.03099, on Yadav et al., arXiv 2306.01708. See `dare_linear` and `ties` for the equations and for
what is the papers'. The disjoint mean divides by the number of agreeing adapters, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux.compose.algebra import cut
from loramux.compose.mergers.dare_linear import DareOptions, dropped
from loramux.compose.mergers.ties import agree
from loramux.compose.parts import Merged, Merger, Part, default_rank


@dataclass(frozen=True, kw_only=True)
class DareTiesOptions(DareOptions):
    sign: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sign not in ("total", "frequency"):
            raise ValueError(f"sign must be 'total' or 'frequency', got {self.sign!r}")


def merge(parts: Sequence[Part], options: DareTiesOptions, seed: int) -> Merged:
    kept = dropped(parts, options.density, seed)
    merged_OI = agree(kept, [part.weight for part in parts], options.sign)
    return cut(merged_OI, default_rank(parts, options.rank), seed)


MERGER = Merger(
    "dare_ties",
    "DARE with TIES",
    "arXiv 2311.03099",
    "chosen; cut by SVD",
    merge,
    DareTiesOptions,
    weights="one",
)
