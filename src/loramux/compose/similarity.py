"""How alike the inputs of a merge are: the cosine of their products, exact and without building one.

    cos(i, j) = sum_m <D_i, D_j> / (||D_i|| ||D_j||),   D = s B^T A at linear m

Why stored with the result: merging adapters that point apart is another thing than averaging near copies, and the
report draws it. A linear that an adapter lacks counts as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramux.compose.algebra import inner, stack
from loramux.compose.sources import Source, parts_at

MOST_BY_SITE = 16  # adapters, beyond which only the matrix over all linears is kept
Matrix = list[list[float]]


def similarity(sources: Sequence[Source], paths: Sequence[str]) -> dict[str, Any]:
    """{"names", "overall": [[N] N], "by_site": {path: [[N] N]}}; cosines in [-1, 1]."""
    num = len(sources)
    total = [[0.0] * num for _ in range(num)]
    by_site: dict[str, Matrix] = {}
    for path in paths:
        gram = _gram(sources, path)
        for i in range(num):
            for j in range(num):
                total[i][j] += gram[i][j]
        if num <= MOST_BY_SITE:
            by_site[path] = _cosines(gram)
    return {"names": [s.name for s in sources], "overall": _cosines(total), "by_site": by_site}


def _gram(sources: Sequence[Source], path: str) -> Matrix:
    held = {
        i: stack(parts_at([source], path, [1.0]))
        for i, source in enumerate(sources)
        if path in source.tensors.sites
    }
    num = len(sources)
    gram = [[0.0] * num for _ in range(num)]
    for i in held:
        for j in held:
            if i <= j:
                gram[i][j] = gram[j][i] = inner(held[i], held[j])
    return gram


def _cosines(gram: Matrix) -> Matrix:
    size = [max(gram[i][i], 0.0) ** 0.5 for i in range(len(gram))]
    return [
        [
            round(max(-1.0, min(1.0, gram[i][j] / (size[i] * size[j]))), 6)
            if size[i] * size[j] > 0
            else 0.0
            for j in range(len(gram))
        ]
        for i in range(len(gram))
    ]
