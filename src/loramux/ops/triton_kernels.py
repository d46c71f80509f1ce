"""Triton source of the shrink and expand kernels, and their launches. Import only where Triton is wanted.

Arguments are annotated as Triton can look them up: it reads annotations when it compiles, and knows no `Any`.

Letters: p pair, d destination row, r rank row of a slot, i input, o output; BLOCK_x: how many a program takes at once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from loramux.ops.contract import Pairs

BLOCK_I = 256
BLOCK_O = 256


def shrink(
    t_Pr: Tensor, x: Tensor, a: Tensor, table: tuple[Tensor, Tensor, Tensor], pairs: Pairs
) -> None:
    """t[p] = scale * weight * rank_weight * (A[slot] x[src]); what lies past the rank is not written."""
    start, rank, scale = table
    gates = pairs.weight if pairs.rank_weight is None else pairs.rank_weight
    block_r = triton.next_power_of_2(t_Pr.shape[1])
    _shrink_kernel[(pairs.num_pairs,)](
        t_Pr, x, a, pairs.src, pairs.slot, pairs.weight, gates.contiguous(), start, rank, scale,
        x.shape[1], t_Pr.shape[1], gates.shape[-1],
        HAS_RANK_WEIGHT=pairs.rank_weight is not None,
        BLOCK_R=block_r,
        BLOCK_I=min(BLOCK_I, triton.next_power_of_2(x.shape[1])),
    )  # fmt: skip


def expand(
    y: Tensor,
    t_Pr: Tensor,
    b: Tensor,
    table: tuple[Tensor, Tensor, Tensor],
    route: Any,
    pairs: Pairs,
) -> None:
    """y[d] += sum over the pairs of d of B[slot]^T t[p], in the order of the pairs."""
    start, rank, _ = table
    block_o = min(BLOCK_O, triton.next_power_of_2(y.shape[1]))
    _expand_kernel[(pairs.num_dst, triton.cdiv(y.shape[1], block_o))](
        y, t_Pr, b, route.order, route.begin, pairs.slot, start, rank,
        y.shape[1], t_Pr.shape[1],
        BLOCK_R=triton.next_power_of_2(t_Pr.shape[1]),
        BLOCK_O=block_o,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _shrink_kernel(
    t_at: tl.tensor,
    x_at: tl.tensor,
    a_at: tl.tensor,
    src_at: tl.tensor,
    slot_at: tl.tensor,
    weight_at: tl.tensor,
    gate_at: tl.tensor,
    start_at: tl.tensor,
    rank_at: tl.tensor,
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
        start = tl.load(start_at + slot).to(tl.int64)
        rank = tl.load(rank_at + slot)
        src = tl.load(src_at + p).to(tl.int64)
        r = tl.arange(0, BLOCK_R)
        is_row = r < rank
        sums = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for first in range(0, width, BLOCK_I):
            i = first + tl.arange(0, BLOCK_I)
            is_input = i < width
            x = tl.load(x_at + src * width + i, mask=is_input, other=0.0).to(tl.float32)
            a = tl.load(
                a_at + (start + r)[:, None] * width + i[None, :],
                mask=is_row[:, None] & is_input[None, :],
                other=0.0,
            ).to(tl.float32)
            sums += tl.sum(a * x[None, :], axis=1)
        sums *= tl.load(scale_at + slot) * tl.load(weight_at + p)
        if HAS_RANK_WEIGHT:
            sums *= tl.load(gate_at + p * gate_stride + r, mask=is_row, other=0.0)
        tl.store(t_at + p * t_stride + r, sums, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _expand_kernel(
    y_at: tl.tensor,
    t_at: tl.tensor,
    b_at: tl.tensor,
    order_at: tl.tensor,
    begin_at: tl.tensor,
    slot_at: tl.tensor,
    start_at: tl.tensor,
    rank_at: tl.tensor,
    width: tl.tensor,
    t_stride: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    d = tl.program_id(0).to(tl.int64)
    begin = tl.load(begin_at + d)
    end = tl.load(begin_at + d + 1)
    if begin < end:
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        is_output = o < width
        r = tl.arange(0, BLOCK_R)
        sums = tl.load(y_at + d * width + o, mask=is_output, other=0.0).to(tl.float32)
        for at in range(begin, end):
            p = tl.load(order_at + at).to(tl.int64)
            slot = tl.load(slot_at + p)
            if slot >= 0:
                start = tl.load(start_at + slot).to(tl.int64)
                is_row = r < tl.load(rank_at + slot)
                t = tl.load(t_at + p * t_stride + r, mask=is_row, other=0.0)
                b = tl.load(
                    b_at + (start + r)[:, None] * width + o[None, :],
                    mask=is_row[:, None] & is_output[None, :],
                    other=0.0,
                ).to(tl.float32)
                sums += tl.sum(b * t[:, None], axis=0)
        tl.store(y_at + d * width + o, sums.to(y_at.dtype.element_ty), mask=is_output)
