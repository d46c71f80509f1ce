"""Dense restatements of the merging papers, from their pages: products are built, nothing is factored or clever.

Shapes are the papers': A [r, d_in], B [d_out, r], an adapter is (A, B, s) and changes the weight by s B A.

Task arithmetic: arXiv 2212.04089. TIES: arXiv 2306.01708. DARE: arXiv 2311.03099. LoRA-LEGO: arXiv 2409.16167.
LoraHub: arXiv 2307.13269.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]


def delta(lora: Lora) -> Tensor:
    a, b, s = lora
    return s * (b @ a)


def weighted_sum(loras: Sequence[Lora], weights: Sequence[float]) -> Tensor:
    return sum(w * delta(lora) for lora, w in zip(loras, weights, strict=True))  # type: ignore[return-value]


def nearest_of_rank(matrix: Tensor, k: int) -> tuple[Tensor, float]:
    """(best rank-k approximation, norm of what is left) by a full SVD."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] @ torch.diag(s[:k]) @ vt[:k], float(s[k:].square().sum().sqrt())


def trim(matrix: Tensor, density: float) -> Tensor:
    """Keep the int(density * numel) entries of largest magnitude."""
    flat = matrix.flatten()
    order = sorted(range(flat.numel()), key=lambda i: -abs(float(flat[i])))
    out = torch.zeros_like(flat)
    for i in order[: int(density * flat.numel())]:
        out[i] = flat[i]
    return out.reshape(matrix.shape)


def elect_and_average(
    deltas: Sequence[Tensor], weights: Sequence[float], by: str = "total"
) -> Tensor:
    """TIES steps 2 and 3, entry by entry."""
    out = torch.zeros_like(deltas[0])
    rows, columns = out.shape
    for i, j in itertools.product(range(rows), range(columns)):
        values = [float(d[i, j]) for d in deltas]
        votes = values if by == "total" else [(v > 0) - (v < 0) for v in values]
        elected = 1 if sum(votes) >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * elected > 0]
        out[i, j] = sum(agreeing) / max(1, len(agreeing))
    return out


def ties(
    loras: Sequence[Lora], weights: Sequence[float], density: float, by: str = "total"
) -> Tensor:
    trimmed = [delta(x) if density >= 1 else trim(delta(x), density) for x in loras]
    return elect_and_average(trimmed, weights, by)


# --- LoRA-LEGO ------------------------------------------------------------------------------------


def units(loras: Sequence[Lora]) -> Tensor:
    """Row j of A beside column j of B, each times sqrt(s): [sum of ranks, d_in + d_out]."""
    return torch.cat([torch.cat([s**0.5 * a, s**0.5 * b.T], dim=1) for a, b, s in loras])


def balanced(pool: Tensor, d_in: int) -> Tensor:
    """Every unit with halves of one length and the same product."""
    out = []
    for unit in pool:
        a, b = unit[:d_in], unit[d_in:]
        c = (b.norm() / a.norm()).sqrt()
        out.append(torch.cat([c * a, b / c]))
    return torch.stack(out)


def best_partition(pool: Tensor, k: int) -> list[list[int]]:
    """The k-means optimum by trying every partition into k non-empty clusters: for a handful of units."""
    best: tuple[float, list[list[int]]] | None = None
    for labels in itertools.product(range(k), repeat=len(pool)):
        clusters = [[i for i, label in enumerate(labels) if label == c] for c in range(k)]
        if all(clusters):
            inertia = sum(float((pool[c] - pool[c].mean(0)).square().sum()) for c in clusters)
            if best is None or inertia < best[0]:
                best = inertia, clusters
    assert best is not None
    return best[1]


def lego(loras: Sequence[Lora], k: int, balance: bool, norm: float = float("inf")) -> Tensor:
    """The merged change of LoRA-LEGO with both reweightings, on the optimal clusters."""
    d_in = loras[0][0].shape[1]
    pool = units(loras)
    if balance:
        pool = balanced(pool, d_in)
    total = torch.zeros(loras[0][1].shape[0], d_in, dtype=pool.dtype)
    for cluster in best_partition(pool, k):
        members = pool[cluster]
        centre = members.mean(0)
        target = torch.stack([torch.linalg.vector_norm(m, ord=norm) for m in members]).mean()
        centre = centre * target / torch.linalg.vector_norm(centre, ord=norm)
        total += torch.outer(centre[d_in:], centre[:d_in])
    r = sum(a.shape[0] for a, _, _ in loras) / len(loras)
    return (r / k) ** 0.5 * total


# --- LoraHub --------------------------------------------------------------------------------------


def lorahub(loras: Sequence[Lora], weights: Sequence[float]) -> Tensor:
    """The factors summed apart, with the shared scale: cross terms and all."""
    total = torch.zeros(loras[0][1].shape[0], loras[0][0].shape[1], dtype=loras[0][0].dtype)
    for (_, b, s), w_i in zip(loras, weights, strict=True):
        for (a, _, _), w_j in zip(loras, weights, strict=True):
            total += s * w_i * w_j * (b @ a)
    return total
