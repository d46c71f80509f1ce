"""Task arithmetic: lambda * sum_i s_i B_i^T A_i; a negative weight subtracts a skill.

Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089. Every weight is 1 and one lambda is
tuned on a development set (0.3 to 1.0 is usual): pass it as `lam`. As `linear`, exact without `rank`.
"""

from __future__ import annotations

from loramux.compose.mergers.linear import LinearOptions, merge
from loramux.compose.parts import Merger

MERGER = Merger(
    "task_arithmetic",
    "Task arithmetic",
    "arXiv 2212.04089",
    "sum of ranks",
    merge,
    LinearOptions,
    weights="one",
)
