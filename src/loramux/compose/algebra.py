"""Exact arithmetic on products of factors, without the products: sums, norms, angles, best approximation of rank k.

Why factors: a 4096 x 4096 product of rank 64 has 32 times more numbers than its factors, and its singular values are
those of a 64 x 64 core. Only methods that work entry by entry (TIES, DARE) ever build a product, one linear at a time.

Letters: R rank rows, k kept rank, I input width, O output width. A product is P = B^T A, [O, I].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.compose.parts import WIDE, Merged, Part

OVERSAMPLE, POWER_ITERATIONS = 16, 4  # of the randomised SVD; ours
EXACT_WIDTH = 1024  # products up to this wide on their narrow side are cut exactly


def stack(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """(A, B) whose product is sum_i w_i s_i B_i^T A_i: weights and scales go on A, ranks add up."""
    a_RI = torch.cat([part.weight * part.scale * part.a for part in parts])
    return a_RI, torch.cat([part.b for part in parts])


def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """<B1^T A1, B2^T A2> = sum((B1 B2^T) * (A1 A2^T)), the Frobenius inner product of two products."""
    (a_RI, b_RO), (a_QI, b_QO) = one, two
    found: float = ((b_RO @ b_QO.T) * (a_RI @ a_QI.T)).sum().item()
    return found


def norm(a_RI: Tensor, b_RO: Tensor) -> float:
    """||B^T A||."""
    return _root(inner((a_RI, b_RO), (a_RI, b_RO)))


def distance(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """||P1 - P2||: the norm of the product of [A1; A2] and [B1; -B2]."""
    a_RI, b_RO = torch.cat([one[0], two[0]]), torch.cat([one[1], -two[1]])
    # By QR and not by `norm`: equal products would differ by the square root of the rounding.
    return float(torch.linalg.matrix_norm(_core(a_RI, b_RO)[0]).item())


def best(a_RI: Tensor, b_RO: Tensor, k: int) -> Merged:
    """The rank-k matrix nearest to B^T A (Eckart-Young), by QR of the factors; B carries the singular values."""
    core_RR, q_IR, q_OR = _core(a_RI, b_RO)
    u_RR, s_R, vt_RR = torch.linalg.svd(core_RR, full_matrices=False)
    k = min(k, s_R.shape[0])
    b_kO = ((q_OR @ u_RR[:, :k]) * s_R[:k]).T
    a_kI = vt_RR[:k] @ q_IR.T
    total = float(s_R.square().sum())
    lost = float(
        s_R[k:].square().sum()
    )  # not total - kept, which would be rounding where nothing is lost
    return Merged(a_kI, b_kO, _root(lost / total) if total > 0 else 0.0)


def _core(a_RI: Tensor, b_RO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B^T A = Q_b (R_b R_a^T) Q_a^T: the small matrix in the middle, then Q_a [I, .] and Q_b [O, .]."""
    q_IR, r_a = torch.linalg.qr(a_RI.T)
    q_OR, r_b = torch.linalg.qr(b_RO.T)
    return r_b @ r_a.T, q_IR, q_OR


def dense(part: Part) -> Tensor:
    """s B^T A itself, [O, I], fp32 and without the weight: for methods that look at single entries."""
    product: Tensor = (part.scale * part.b).float().T @ part.a.float()
    return product


def cut(product_OI: Tensor, k: int, seed: int) -> Merged:
    """A dense matrix to rank k: exactly where its narrow side is small, else by a randomised SVD.

    The error is that of the result either way: with U S V^T taken from a projection of D, ||D - U S V^T||^2 is
    ||D||^2 - ||S||^2.
    """
    narrow = min(product_OI.shape)
    k = min(k, narrow)
    find = _by_gram if narrow <= EXACT_WIDTH or k + OVERSAMPLE >= narrow else _randomised
    u_Ok, s_k, v_Ik = find(product_OI, k, seed)
    total = torch.linalg.vector_norm(product_OI, dtype=WIDE).square()
    return Merged(v_Ik.T.to(WIDE), (u_Ok * s_k).T.to(WIDE), _lost(total, s_k.to(WIDE)))


def _by_gram(product_OI: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right singular vectors from the Gram matrix of the narrow side, in fp64."""
    if product_OI.shape[0] > product_OI.shape[1]:
        v_Ik, s_k, u_Ok = _by_gram(product_OI.T, k, seed)
        return u_Ok, s_k, v_Ik
    wide_OI = product_OI.to(WIDE)
    u_Ok = torch.linalg.eigh(wide_OI @ wide_OI.T).eigenvectors[:, -k:].flip(1)
    v_Ik = wide_OI.T @ u_Ok
    s_k = torch.linalg.vector_norm(v_Ik, dim=0)
    return u_Ok, s_k, v_Ik / s_k.clamp_min(torch.finfo(WIDE).tiny)


def _randomised(product_OI: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson and Tropp's range finder with power iterations, as torch has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(product_OI, q=k + OVERSAMPLE, niter=POWER_ITERATIONS)
    return u[:, :k], s[:k], v[:, :k]


def _root(share: float) -> float:
    return math.sqrt(max(share, 0.0))


def _lost(total: Tensor, kept: Tensor) -> float:
    """sqrt(1 - kept energy / total energy)."""
    if float(total) == 0:
        return 0.0
    return _root(1.0 - float(kept.square().sum() / total))
