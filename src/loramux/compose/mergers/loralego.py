"""LoRA-LEGO: cluster the rank-1 pieces of all adapters, keep one re-scaled centroid per cluster.

Zhao et al., Merging LoRAs like Playing LEGO, ICLR 2025, arXiv 2409.16167. Row j of A_i beside row j of B_i is a
Minimal Semantic Unit u, scaled by sqrt(s_i) on both sides so that the result has scale 1. Per linear, over all units:

    clusters  = k-means with k centres, squared Euclidean distance
    mu_c      = mean of the members of c
    mu_c     <- mu_c * mean_u ||u|| / ||mu_c||      infinity norm: averaging shrinks (parameter reweighting)
    A[c], B[c] = the two halves of mu_c;   B *= sqrt(r / k)      the sum of units grows (output reweighting)

r is the mean rank of the adapters that have the linear. The formulas of both reweightings are those that two
independent implementations share; the paper gives the idea. With k = all units the result is
sum_i s_i B_i^T A_i / sqrt(N) for equal ranks; with N equal adapters and k = r it is that adapter. One adapter and
k < r is a compression of it.

Ours: the pool is put in a canonical order first, so ranks and adapters may be permuted without changing a bit; and
`balance` (on) rescales every unit to ||a|| = ||b||, which leaves its product alone: (c a, b / c) is the same piece, but
another point to k-means. Sample weights make an adapter's units count more in centres and centroids.

Letters: U units of the pool, k clusters, D = I + O width of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loramux.compose.checks import check_rank
from loramux.compose.parts import WIDE, Merged, Merger, Part, default_rank
from loramux.core.values import check_whole
from loramux.errors import require


@dataclass(frozen=True, kw_only=True)
class LegoOptions:
    """rank: the number of clusters; None: the largest rank of the inputs. Where there are fewer units, all are kept.

    balance: off for the paper to the letter. align_sign: (-a, -b) is the same piece too; makes the largest entry of
    every a positive, for adapters that were not trained from one start. norm: of the parameter reweighting.
    """

    rank: int | None = None
    balance: bool = True
    align_sign: bool = False
    norm: Literal["inf", "l2"] = "inf"
    reweight_parameters: bool = True
    reweight_output: bool = True
    n_init: int = 10
    max_iter: int = 300

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_whole("n_init", self.n_init)
        check_whole("max_iter", self.max_iter)
        if self.norm not in ("inf", "l2"):
            raise ValueError(f"norm must be 'inf' or 'l2', got {self.norm!r}")


def merge(parts: Sequence[Part], options: LegoOptions, seed: int) -> Merged:
    units_UD, weight_U = pool(parts, options)
    k = min(default_rank(parts, options.rank), units_UD.shape[0])
    member_U = cluster(units_UD, weight_U, k, options, seed)
    centre_kD = centroids(units_UD, weight_U, member_U, options)
    d_in = parts[0].a.shape[1]
    a_kI, b_kO = centre_kD[:, :d_in], centre_kD[:, d_in:]
    if options.reweight_output:
        mean_rank = sum(part.rank for part in parts) / len(parts)
        b_kO = b_kO * (mean_rank / centre_kD.shape[0]) ** 0.5
    return Merged(a_kI, b_kO, None)


def pool(parts: Sequence[Part], options: LegoOptions) -> tuple[Tensor, Tensor]:
    """(units [U, D], sample weights [U]) in canonical order: by length, then entry by entry."""
    units, weights = [], []
    for part in parts:
        root = abs(part.scale) ** 0.5
        a, b = root * part.a, (root if part.scale > 0 else -root) * part.b
        if options.balance:
            a, b = _balanced(a, b)
        if options.align_sign:
            a, b = _signed(a, b)
        units.append(torch.cat([a, b], dim=1))
        weights += [part.weight] * part.rank
    units_UD = torch.cat(units).contiguous()
    length_U = torch.linalg.vector_norm(units_UD, dim=1).tolist()
    rows = units_UD.numpy()
    order = sorted(range(len(rows)), key=lambda i: (length_U[i], rows[i].tobytes(), weights[i]))
    return units_UD[order], torch.tensor(weights, dtype=WIDE)[order]


def _balanced(a_RI: Tensor, b_RO: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with ||a|| = ||b||; units with a zero half stay as they are."""
    size_a = torch.linalg.vector_norm(a_RI, dim=1, keepdim=True)
    size_b = torch.linalg.vector_norm(b_RO, dim=1, keepdim=True)
    ratio = torch.where((size_a > 0) & (size_b > 0), size_b / size_a, 1.0).sqrt()
    return a_RI * ratio, b_RO / ratio


def _signed(a_RI: Tensor, b_RO: Tensor) -> tuple[Tensor, Tensor]:
    top = a_RI.gather(1, a_RI.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(a_RI.dtype)
    return a_RI * sign, b_RO * sign


def cluster(units_UD: Tensor, weight_U: Tensor, k: int, options: LegoOptions, seed: int) -> Tensor:
    """The cluster of every unit, numbered in the order of their first units; empty ones are left out."""
    if k >= units_UD.shape[0]:
        return torch.arange(units_UD.shape[0])
    # Equal units are neighbours in canonical order and one point: k-means must not tell them apart by rounding.
    is_new_U = torch.ones(units_UD.shape[0], dtype=torch.bool)
    is_new_U[1:] = (units_UD[1:] != units_UD[:-1]).any(dim=1)
    group_U = is_new_U.long().cumsum(0) - 1
    points = units_UD[is_new_U]
    mass = torch.zeros(points.shape[0], dtype=WIDE).index_add(0, group_U, weight_U)
    label = _k_means(points, mass, k, options, seed)[group_U].tolist()
    number = {found: i for i, found in enumerate(dict.fromkeys(label))}
    return torch.tensor([number[found] for found in label])


def _k_means(points_PD: Tensor, mass_P: Tensor, k: int, options: LegoOptions, seed: int) -> Tensor:
    num = points_PD.shape[0]
    if k >= num:
        return torch.arange(num)
    require("sklearn", "compose", "merging with loralego")
    from sklearn.cluster import KMeans

    # Distances are those in the span of the points, which has at most as many coordinates as there are points.
    within = torch.linalg.qr(points_PD.T, mode="r").R.T if num < points_PD.shape[1] else points_PD
    means = KMeans(
        k, init="k-means++", n_init=options.n_init, max_iter=options.max_iter, random_state=seed
    )
    return torch.as_tensor(
        means.fit_predict(within.contiguous().numpy(), sample_weight=mass_P.numpy())
    )


def centroids(units_UD: Tensor, weight_U: Tensor, member_U: Tensor, options: LegoOptions) -> Tensor:
    """Weighted mean of each cluster, brought back to its members' mean norm: [k, D]. Singletons stay as they are."""
    order = float("inf") if options.norm == "inf" else 2
    centres = []
    for number in range(int(member_U.max()) + 1):
        own = member_U == number
        units, weight = units_UD[own], weight_U[own] / weight_U[own].sum()
        if units.shape[0] == 1:
            centres.append(units[0])
            continue
        mean_D = weight @ units
        if options.reweight_parameters:
            was = weight @ torch.linalg.vector_norm(units, ord=order, dim=1)
            now = torch.linalg.vector_norm(mean_D, ord=order)
            mean_D = mean_D * (was / now) if float(now) > 0 else mean_D
        centres.append(mean_D)
    return torch.stack(centres)


MERGER = Merger(
    "loralego",
    "LoRA-LEGO",
    "arXiv 2409.16167",
    "chosen",
    merge,
    LegoOptions,
    signed=False,
    sums=False,
)
