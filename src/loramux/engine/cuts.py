"""Draws from rows cut by rank or mass (top_k, top_p, min_p), looking at their largest logits only.

Why: a cut nearly always keeps fewer than a few hundred of 49152 tokens, and sorting all takes longer than all else. So
a row is cut among its K largest; where that turns out not to hold all that is kept (mass not reached, or a tie at the
edge), K grows for those rows, up to the whole vocabulary. The outcome is that of the full sort, ties to the lower id.

The cuts are those of transformers: top_k keeps all that tie with the k-th; top_p keeps a token while the mass before
it is below p, of what top_k kept; min_p keeps p >= min_p * the largest p.

Letters: S rows, V vocabulary, K candidates in falling order, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.engine.request import SamplingParams

FIRST_K = 256
GROWTH = 16
BLOCK = 64
MARGIN = (
    16  # candidates beyond the largest top_k, so that ties at its edge seldom need a second look
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def draw_cut(x_SV: Tensor, params: Many[SamplingParams], heat_S: Floats, uniform_S: Floats) -> Ints:
    """One token per row; `heat_S` are temperatures, `uniform_S` numbers in [0, 1), one per row."""
    vocab = x_SV.shape[1]
    top_k_S = np.array([min(p.top_k, vocab) for p in params])
    top_p_S = np.array([p.top_p for p in params])
    min_p_S = np.array([p.min_p for p in params])
    mass_S = _mass(x_SV, heat_S, (top_k_S == 0) & (top_p_S < 1))
    value_S, rank_S = np.empty(len(params)), np.empty(len(params), np.int64)
    left, num = np.arange(len(params)), FIRST_K
    while len(left):
        num = min(vocab, max(num, int(top_k_S[left].max()) + MARGIN))
        rows = np.arange(len(left))
        x_SK = largest(x_SV if len(left) == len(params) else x_SV[left], num)
        weights_SK = np.exp((x_SK - x_SK[:, :1]) / heat_S[left, None])
        kept, ranked = _num_kept(
            x_SK, weights_SK, mass_S[left], top_k_S[left], top_p_S[left], min_p_S[left]
        )
        places = _places(weights_SK, kept, uniform_S[left])
        drawn = x_SK[rows, places]
        value_S[left], rank_S[left] = drawn, places - (x_SK > drawn[:, None]).sum(-1)
        # Enough was looked at if all that ties with the last one kept is there, and all that a top_k counts.
        is_done = np.minimum(x_SK[rows, kept - 1], x_SK[rows, ranked - 1]) > x_SK[:, -1]
        left = left[~is_done & (num < vocab)]
        num *= GROWTH
    return _tokens_of(x_SV, value_S, rank_S)


def _mass(x_SV: Tensor, heat_S: Floats, is_wanted_S: NDArray[np.bool_]) -> Floats:
    """Sum of exp((x - largest) / temperature) over whole rows, where that is wanted."""
    mass_S = np.zeros(len(heat_S))
    rows = np.flatnonzero(is_wanted_S)
    if len(rows):
        x = x_SV if len(rows) == len(heat_S) else x_SV[rows]
        heat = torch.from_numpy(heat_S[rows]).float().to(x.device)[:, None]
        # The softmax of one row does not depend on how many there are; a plain sum may.
        mass_S[rows] = 1 / (x / heat).softmax(-1).amax(-1).double().cpu().numpy()
    return mass_S


def _num_kept(
    x_SK: Floats, w_SK: Floats, mass_S: Floats, top_k_S: Ints, top_p_S: Floats, min_p_S: Floats
) -> tuple[Ints, Ints]:
    """How many of a row's candidates survive all cuts (at least 1), and how many survive top_k (1 without one)."""
    rows, num = np.arange(len(x_SK)), x_SK.shape[1]
    edge_S = x_SK[rows, np.where(top_k_S > 0, top_k_S, num) - 1]
    num_k = np.where(top_k_S > 0, (x_SK >= edge_S[:, None]).sum(-1), num)
    sums_SK = w_SK.cumsum(-1)
    mass_S = np.where(top_k_S > 0, sums_SK[rows, num_k - 1], mass_S)
    num_p = (sums_SK - w_SK < (top_p_S * mass_S)[:, None]).sum(-1)
    num_p = np.where(top_p_S < 1, num_p, num)
    num_m = (w_SK >= min_p_S[:, None]).sum(-1)
    kept: Ints = np.maximum(np.minimum(np.minimum(num_k, num_p), num_m), 1)
    return kept, np.where(top_k_S > 0, num_k, 1)


def _places(w_SK: Floats, kept_S: Ints, uniform_S: Floats) -> Ints:
    """The place of each row's draw among its first `kept_S` candidates."""
    sums_SK = w_SK.cumsum(-1)
    target_S = uniform_S * sums_SK[np.arange(len(w_SK)), kept_S - 1]
    places: Ints = np.minimum((sums_SK <= target_S[:, None]).sum(-1), kept_S - 1)
    return places


def _tokens_of(x_SV: Tensor, value_S: Floats, rank_S: Ints) -> Ints:
    """The ids of the drawn logits: of those that are equal the one of this rank, in the order of ids."""
    values = host_view(x_SV)
    if values is not None:
        drawn = zip(values, value_S.astype(np.float32), rank_S, strict=True)
        return np.array([np.flatnonzero(row == value)[rank] for row, value, rank in drawn])
    equal_SV = x_SV == torch.from_numpy(value_S).float().to(x_SV.device)[:, None]
    rank = torch.from_numpy(rank_S).to(x_SV.device)[:, None]
    tokens: Ints = (equal_SV & (equal_SV.cumsum(-1) == rank + 1)).int().argmax(-1).cpu().numpy()
    return tokens


def largest(x_SV: Tensor, num: int) -> Floats:
    """The `num` largest logits of each row, in falling order."""
    values_SV = host_view(x_SV)
    if values_SV is None:
        best: Floats = x_SV.topk(num).values.double().cpu().numpy()
        return best
    num_blocks = x_SV.shape[1] // BLOCK
    if num > num_blocks // 2:
        # numpy's sort is more than ten times as quick as torch's, and quicker than its topk.
        return np.sort(values_SV, axis=-1)[:, : -num - 1 : -1].astype(np.float64)
    # `num` blocks have such a maximum, so at least `num` logits are as large as the least of these maxima.
    tops_SN = x_SV[:, : num_blocks * BLOCK].unflatten(1, (-1, BLOCK)).amax(-1).numpy()
    least_S = np.partition(tops_SN, num_blocks - num, axis=-1)[:, num_blocks - num]
    out = np.empty((len(values_SV), num))
    for i, (row, least) in enumerate(zip(values_SV, least_S, strict=True)):
        out[i] = np.sort(row[row >= least])[: -num - 1 : -1]
    return out


def host_view(x: Tensor) -> NDArray[np.float32] | None:
    """The tensor as a numpy array without a copy; None if it is on a device, where torch is the quicker one."""
    if x.device.type != "cpu":
        return None
    view: NDArray[np.float32] = x.numpy()
    return view
