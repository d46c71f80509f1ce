"""Triton source of the pooled shrink and expand kernels, and their launches. Import only where Triton is wanted.

Rows are found by byte offsets in one arena that holds bf16 and fp32 side by side; ranks are walked 16 at a time, so
that slots of any rank meet in one launch.

Arguments are annotated as Triton can look them up: it reads annotations when it compiles, and knows no `Any`.

Letters: p pair, d destination row, r rank row of a slot, i input, o output; BLOCK_x: how many a program takes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.ops.contract import Pairs

BLOCK_R = 16
BLOCK_I = 256
BLOCK_O = 256


def shrink(
    t_Pr: Tensor, x: Tensor, arena: Tensor, columns: Mapping[str, Tensor], pairs: Pairs
) -> None:
    """t[p] = scale * weight * rank_weight * (A[slot] x[src]); what lies past the rank is not written."""
    gates = pairs.weight if pairs.rank_weight is None else pairs.rank_weight
    _shrink_kernel[(pairs.num_pairs,)](
        t_Pr, x, arena.view(torch.bfloat16), arena.view(torch.float32),
        pairs.src, pairs.slot, pairs.weight, gates.contiguous(),
        columns["a_at"], columns["rank"], columns["type"], columns["scale"],
        x.shape[1], t_Pr.shape[1], gates.shape[-1],
        HAS_RANK_WEIGHT=pairs.rank_weight is not None,
        BLOCK_R=BLOCK_R,
        BLOCK_I=min(BLOCK_I, triton.next_power_of_2(x.shape[1])),
    )  # fmt: skip


def expand(
    y: Tensor,
    t_Pr: Tensor,
    arena: Tensor,
    columns: Mapping[str, Tensor],
    route: Any,
    pairs: Pairs,
    base: Tensor | None,
) -> None:
    """y[d] += sum over the pairs of d, in their order, of B[slot]^T t[p], or of what a gain makes of it."""
    block_o = min(BLOCK_O, triton.next_power_of_2(y.shape[1]))
    _expand_kernel[(pairs.num_dst, triton.cdiv(y.shape[1], block_o))](
        y, y if base is None else base, t_Pr, arena.view(torch.bfloat16), arena.view(torch.float32),
        route.order, route.begin, pairs.src, pairs.slot, pairs.weight,
        columns["b_at"], columns["gain_at"], columns["rank"], columns["type"],
        y.shape[1], t_Pr.shape[1],
        HAS_BASE=base is not None,
        BLOCK_R=BLOCK_R,
        BLOCK_O=block_o,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _rows(
    half_at: tl.tensor,
    full_at: tl.tensor,
    start: tl.tensor,
    kind: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """Numbers `place` behind byte `start` of the arena (kind 0: fp32, 1: bf16), as fp32."""
    kinds = kind + place * 0  # a block: the interpreter takes no scalar in a mask
    half = tl.load(half_at + start // 2 + place, mask=mask & (kinds == 1), other=0.0).to(tl.float32)
    full = tl.load(full_at + start // 4 + place, mask=mask & (kinds == 0), other=0.0)
    return half + full


@triton.jit  # type: ignore[untyped-decorator]
def _shrink_kernel(
    t_at: tl.tensor,
    x_at: tl.tensor,
    half_at: tl.tensor,
    full_at: tl.tensor,
    src_at: tl.tensor,
    slot_at: tl.tensor,
    weight_at: tl.tensor,
    gate_at: tl.tensor,
    a_at: tl.tensor,
    rank_at: tl.tensor,
    type_at: tl.tensor,
    scale_at: tl.tensor,
    width: tl.tensor,
    t_stride: tl.tensor,
    gate_stride: tl.tensor,
    HAS_RANK_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    p = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_at + p)
    if slot >= 0:
        start = tl.load(a_at + slot)
        rank = tl.load(rank_at + slot)
        kind = tl.load(type_at + slot)
        src = tl.load(src_at + p).to(tl.int64)
        gate = tl.load(scale_at + slot) * tl.load(weight_at + p)
        for first_rank in range(0, rank, BLOCK_R):
            r = first_rank + tl.arange(0, BLOCK_R)
            sums = tl.zeros((BLOCK_R,), dtype=tl.float32)
            for first in range(0, width, BLOCK_I):
                i = first + tl.arange(0, BLOCK_I)
                x = tl.load(x_at + src * width + i, mask=i < width, other=0.0).to(tl.float32)
                mask = (r < rank)[:, None] & (i < width)[None, :]
                place = r.to(tl.int64)[:, None] * width + i[None, :]
                sums += tl.sum(
                    _rows(half_at, full_at, start, kind, place, mask) * x[None, :], axis=1
                )
            sums *= gate
            if HAS_RANK_WEIGHT:
                sums *= tl.load(gate_at + p * gate_stride + r, mask=r < rank, other=0.0)
            tl.store(t_at + p * t_stride + r, sums, mask=r < rank)


@triton.jit  # type: ignore[untyped-decorator]
def _expand_kernel(
    y_at: tl.tensor,
    base_at: tl.tensor,
    t_at: tl.tensor,
    half_at: tl.tensor,
    full_at: tl.tensor,
    order_at: tl.tensor,
    begin_at: tl.tensor,
    src_at: tl.tensor,
    slot_at: tl.tensor,
    weight_at: tl.tensor,
    b_at: tl.tensor,
    gain_at: tl.tensor,
    rank_at: tl.tensor,
    type_at: tl.tensor,
    width: tl.tensor,
    t_stride: tl.tensor,
    HAS_BASE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    d = tl.program_id(0).to(tl.int64)
    begin = tl.load(begin_at + d)
    end = tl.load(begin_at + d + 1)
    if begin < end:
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        is_output = o < width
        sums = tl.load(y_at + d * width + o, mask=is_output, other=0.0).to(tl.float32)
        for at in range(begin, end):
            p = tl.load(order_at + at).to(tl.int64)
            slot = tl.load(slot_at + p)
            if slot >= 0:
                start = tl.load(b_at + slot)
                rank = tl.load(rank_at + slot)
                kind = tl.load(type_at + slot)
                change = tl.zeros((BLOCK_O,), dtype=tl.float32)
                for first_rank in range(0, rank, BLOCK_R):
                    r = first_rank + tl.arange(0, BLOCK_R)
                    t = tl.load(t_at + p * t_stride + r, mask=r < rank, other=0.0)
                    mask = (r < rank)[:, None] & is_output[None, :]
                    place = r.to(tl.int64)[:, None] * width + o[None, :]
                    change += tl.sum(
                        _rows(half_at, full_at, start, kind, place, mask) * t[:, None], axis=0
                    )
                if HAS_BASE:
                    gain_start = tl.load(gain_at + slot)
                    has_gain = gain_start + o * 0 >= 0
                    gain = tl.load(
                        full_at + gain_start // 4 + o, mask=is_output & has_gain, other=1.0
                    )
                    src = tl.load(src_at + p).to(tl.int64)
                    base = tl.load(base_at + src * width + o, mask=is_output & has_gain, other=0.0)
                    weight = tl.load(weight_at + p)
                    change = gain * change + weight * (gain - 1.0) * base.to(tl.float32)
                sums += change
        tl.store(y_at + d * width + o, sums.to(y_at.dtype.element_ty), mask=is_output)
