"""Triton source of the paged write and decode kernels, and their launches. Import only where Triton is wanted.

Arguments are annotated as Triton can look them up: it reads annotations when it compiles, and knows no `Any`.

Letters: n row of the step, s decode, h query head, g key/value head, k and v number of a key and of a value, c token of
the context; BLOCK_x: how many a program takes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from loramux.ops.paged import LayerKV
    from loramux.ops.paged_triton import DecodeTable

BLOCK_C = 32


def write(key_GND: Tensor, value_GND: Tensor, kv: LayerKV, slot_N: Tensor) -> None:
    """Puts the rows' keys and values into the blocks that `slot_N` names; rows of slot -1 go nowhere."""
    keys, values = kv.keys_BGDTP, kv.values_BGTDP
    heads, rows, key_dim = key_GND.shape
    value_dim = value_GND.shape[2]
    _write_kernel[(rows, heads)](
        key_GND, value_GND, keys, values, slot_N,
        *key_GND.stride(), *value_GND.stride(),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        key_dim, value_dim,
        BLOCK_T=kv.block_size,
        KEY_PACK=keys.shape[4],
        VALUE_PACK=values.shape[4],
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=triton.next_power_of_2(value_dim),
    )  # fmt: skip


def decode(query_HND: Tensor, kv: LayerKV, table: DecodeTable, out_NHD: Tensor) -> None:
    """Attention of the decoded rows, each over its own blocks, into `out_NHD`."""
    keys, values = kv.keys_BGDTP, kv.values_BGTDP
    heads, key_dim, value_dim = query_HND.shape[0], query_HND.shape[2], values.shape[3]
    _decode_kernel[(table.row_S.shape[0], heads)](
        query_HND, keys, values, out_NHD, table.row_S, table.length_S, table.blocks_SW,
        *query_HND.stride(), *out_NHD.stride(), table.blocks_SW.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        key_dim, value_dim, kv.scale, kv.window or 0, kv.softcap or 0.0,
        GROUP=heads // keys.shape[1],
        HAS_WINDOW=kv.window is not None,
        HAS_SOFTCAP=kv.softcap is not None,
        BLOCK_T=kv.block_size,
        KEY_PACK=keys.shape[4],
        VALUE_PACK=values.shape[4],
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=triton.next_power_of_2(value_dim),
        BLOCK_C=BLOCK_C,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _write_kernel(
    key_at: tl.tensor,
    value_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    slot_at: tl.tensor,
    key_head: tl.tensor,
    key_row: tl.tensor,
    key_step: tl.tensor,
    value_head: tl.tensor,
    value_row: tl.tensor,
    value_step: tl.tensor,
    keys_block: tl.tensor,
    keys_head: tl.tensor,
    values_block: tl.tensor,
    values_head: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    BLOCK_T: tl.constexpr,
    KEY_PACK: tl.constexpr,
    VALUE_PACK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_at + n).to(tl.int64)
    if slot >= 0:
        block = slot // BLOCK_T
        t = slot % BLOCK_T
        k = tl.arange(0, BLOCK_K)
        key = tl.load(
            key_at + g * key_head + n * key_row + k * key_step, mask=k < key_dim, other=0.0
        )
        key_place = (k // KEY_PACK) * (BLOCK_T * KEY_PACK) + t * KEY_PACK + k % KEY_PACK
        tl.store(keys_at + block * keys_block + g * keys_head + key_place, key, mask=k < key_dim)
        v = tl.arange(0, BLOCK_V)
        value = tl.load(
            value_at + g * value_head + n * value_row + v * value_step,
            mask=v < value_dim,
            other=0.0,
        )
        value_place = ((t // VALUE_PACK) * value_dim + v) * VALUE_PACK + t % VALUE_PACK
        tl.store(
            values_at + block * values_block + g * values_head + value_place,
            value,
            mask=v < value_dim,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _decode_kernel(
    query_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    out_at: tl.tensor,
    row_at: tl.tensor,
    length_at: tl.tensor,
    blocks_at: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    query_step: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    out_step: tl.tensor,
    table_row: tl.tensor,
    keys_block: tl.tensor,
    keys_head: tl.tensor,
    values_block: tl.tensor,
    values_head: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEY_PACK: tl.constexpr,
    VALUE_PACK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    g = h // GROUP
    row = tl.load(row_at + s).to(tl.int64)
    length = tl.load(length_at + s)
    start = length * 0
    if HAS_WINDOW:
        start = tl.maximum(length - window, 0)
    k = tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    q = tl.load(
        query_at + h * query_head + row * query_row + k * query_step, mask=k < key_dim, other=0.0
    ).to(tl.float32)
    key_place = (k // KEY_PACK) * (BLOCK_T * KEY_PACK) + k % KEY_PACK
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(start, length, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        is_seen = c < length
        block = tl.load(blocks_at + s * table_row + c // BLOCK_T, mask=is_seen, other=0)
        block = block.to(tl.int64)
        t = c % BLOCK_T
        at = block * keys_block + g * keys_head + t * KEY_PACK
        # What lies behind the length may be anything, NaN included: it is not read.
        key = tl.load(
            keys_at + at[:, None] + key_place[None, :],
            mask=is_seen[:, None] & (k < key_dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        score = tl.sum(key * q[None, :], axis=1) * scale
        if HAS_SOFTCAP:
            # tanh, which has no name of its own here; the exponential is at most 1.
            size = tl.exp(-2.0 * tl.abs(score / softcap))
            bend = (1.0 - size) / (1.0 + size) * softcap
            score = tl.where(score < 0, -bend, bend)
        score = tl.where(is_seen, score, float("-inf"))
        peak = tl.maximum(highest, tl.max(score, axis=0))
        share = tl.exp(score - peak)
        shrink = tl.exp(highest - peak)
        at = block * values_block + g * values_head + (t // VALUE_PACK) * (value_dim * VALUE_PACK)
        value = tl.load(
            values_at + (at + t % VALUE_PACK)[:, None] + (v * VALUE_PACK)[None, :],
            mask=is_seen[:, None] & (v < value_dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        total = total * shrink + tl.sum(share, axis=0)
        sums = sums * shrink + tl.sum(value * share[:, None], axis=0)
        highest = peak
    sums = sums / tl.where(total == 0, 1.0, total)
    tl.store(
        out_at + row * out_row + h * out_head + v * out_step,
        sums.to(out_at.dtype.element_ty),
        mask=v < value_dim,
    )
