"""From what was retrieved to what is applied: one adapter, or a mean of several.

Why 1/k and not the scores: the paper's rule; the engine adds the outputs with these weights, so an adapter that does
not have a linear counts as zero there and the others keep 1/k. Ids are sorted, so equal sets give equal requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.retriever import Retrieved
from loramux.retrieval.text import Floats

Mode = Literal["selection", "mixture"]


def weights(
    retrieved: Retrieved, mode: Mode = "mixture", *, temperature: float | None = None
) -> dict[str, float]:
    """{id: weight}, adding up to 1; empty where retrieval abstained.

    selection: the best hit alone. mixture: 1/k each, or with a temperature a softmax of the scores (ours).
    """
    hits = retrieved.hits
    if mode not in ("selection", "mixture"):
        raise RetrievalError(f"mode {mode!r} is not known; allowed: selection, mixture")
    if temperature is not None and not temperature > 0:
        raise RetrievalError(f"temperature must be above 0, got {temperature}")
    if not hits:
        return {}
    if mode == "selection":
        return {hits[0].id: 1.0}
    if temperature is None:
        return {id: 1.0 / len(hits) for id in sorted(retrieved.ids)}
    best = hits[0].score
    shares = {hit.id: math.exp((hit.score - best) / temperature) for hit in hits}
    total = sum(shares.values())
    return {id: shares[id] / total for id in sorted(shares)}


def mapping(batch: Sequence[dict[str, float]]) -> tuple[list[str], Floats]:
    """The paper's M: the different ids of a batch in rising order, and a row of weights over them per request."""
    ids = sorted({id for row in batch for id in row})
    place = {id: column for column, id in enumerate(ids)}
    found = np.zeros((len(batch), len(ids)), np.float32)
    for number, row in enumerate(batch):
        for id, weight in row.items():
            found[number, place[id]] = weight
    return ids, found
