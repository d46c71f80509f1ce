"""LoraRetriever (Zhao et al., 2024), restated densely in float64: the page's equations, term by term.

Letters: B rows of a batch, L tokens, P distinct adapters, R rank rows, I input width, O output width, D width of
sentence vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def adapter_vector(samples_MD: Array) -> Array:
    """The mean of the samples' unit vectors, renormalised (equation 2, choice A1)."""
    units = samples_MD / np.linalg.norm(samples_MD, axis=1, keepdims=True)
    mean = units.mean(0)
    return mean / np.linalg.norm(mean)


def cosines(prompt_D: Array, adapters: Sequence[Array]) -> Array:
    """Equation 3 for every adapter, each given by its samples' vectors."""
    unit = prompt_D / np.linalg.norm(prompt_D)
    return np.array([float(unit @ adapter_vector(samples)) for samples in adapters])


def mixture(
    x_BLI: Array, m_BP: Array, a: Sequence[Array], b: Sequence[Array], s: Sequence[float]
) -> Array:
    """Equation 9 as a loop: sum_p M[i, p] s_p B_p A_p x."""
    rows = []
    for x_LI, weights in zip(x_BLI, m_BP, strict=True):
        parts = [
            w * sp * (x_LI @ ap.T) @ bp.T for w, sp, ap, bp in zip(weights, s, a, b, strict=True)
        ]
        rows.append(sum(parts))
    return np.stack(rows)


def mixture_in_rank_space(
    x_BLI: Array, m_BP: Array, a: Sequence[Array], b: Sequence[Array], s: Sequence[float]
) -> Array:
    """The same, with weight and scale applied to the r numbers between A and B."""
    out = 0.0
    for p, (ap, bp, sp) in enumerate(zip(a, b, s, strict=True)):
        z_BLR = (x_BLI @ ap.T) * (m_BP[:, p] * sp)[:, None, None]
        out = out + z_BLR @ bp.T
    return np.asarray(out)


def fusion(a: Sequence[Array], b: Sequence[Array], scale: float) -> tuple[Array, Array]:
    """Equation 7: the factors of the fused adapter, the scale on B."""
    return np.mean(a, axis=0), scale * np.mean(b, axis=0)


def mapping(sets: Sequence[Sequence[str]]) -> tuple[list[str], Array]:
    """M of equation 9: the union of the batch and 1/k for each id of a row."""
    union = sorted({id for row in sets for id in row})
    found = np.zeros((len(sets), len(union)))
    for i, row in enumerate(sets):
        for id in row:
            found[i, union.index(id)] += 1.0 / len(row)
    return union, found


def tfidf_cosines(prompt: str, pools: Sequence[Sequence[str]], words: object) -> Array:
    """Cosine of the prompt's TF-IDF vector with each adapter's centroid, over a real vocabulary.

    words: text -> list of terms. A centroid is the mean of the unit term-frequency vectors, weighted by IDF.
    """
    assert callable(words)
    samples = [text for pool in pools for text in pool]
    terms = sorted({term for text in (*samples, prompt) for term in words(text)})
    column = {term: i for i, term in enumerate(terms)}

    def frequencies(text: str) -> Array:
        found = np.zeros(len(terms))
        for term in words(text):
            found[column[term]] += 1
        return np.where(found > 0, 1 + np.log(np.maximum(found, 1)), 0)

    seen = np.sum([frequencies(text) > 0 for text in samples], axis=0)
    idf = np.log((1 + len(samples)) / (1 + seen)) + 1

    def unit(vector: Array) -> Array:
        return vector / np.linalg.norm(vector)

    query = unit(frequencies(prompt) * idf)
    centres = [np.mean([unit(frequencies(text)) for text in pool], axis=0) for pool in pools]
    return np.array([float(query @ unit(centre * idf)) for centre in centres])


def standardised_sum(lexical: Array, dense: Array, weight: float) -> Array:
    """The hybrid score of one query over its candidates."""

    def z(values: Array) -> Array:
        return (values - values.mean()) / values.std()

    return (1 - weight) * z(lexical) + weight * z(dense)
