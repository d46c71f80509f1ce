"""Attention over the KV pool on a device: two Triton kernels, one that writes new keys and values, one that decodes.

Nothing here waits for the device: what a step reads lies in tensors (slots, lengths, a table of blocks), so a step
whose tensors stay where they are can be captured as a graph. A row without a place (slot -1) writes nothing, a decode
of length 0 reads nothing and gives zeros: that is how a captured step is padded. The softmax is fp32, over the context
in pieces of one size from the first token seen, so a row's bits do not depend on its neighbours.

Letters: as in ops/paged.py; W blocks that a row of the table has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramux.ops.choose import why_not
from loramux.ops.triton import is_interpreted

if TYPE_CHECKING:
    from loramux.ops.paged import LayerKV, PagedRows

KEY = "triton"


@dataclass(frozen=True, eq=False)
class DecodeTable:
    """The decodes of a step, on the device: row_S and length_S int32 [S], blocks_SW int32 [S, W] with any padding."""

    row_S: Tensor
    length_S: Tensor
    blocks_SW: Tensor


def runs_triton(kv: LayerKV) -> bool:
    """Whether this layer's pool lies where Triton runs: on a GPU, or anywhere in Triton's interpreter."""
    device = kv.keys_BGDTP.device
    wanted = device.type == "cuda" or is_interpreted()
    return wanted and not why_not("triton", device, kv.keys_BGDTP.dtype, needs_grad=False)


def attend_decodes(
    query: Tensor, key: Tensor, value: Tensor, kv: LayerKV, rows: PagedRows, out: Tensor
) -> None:
    """Writes keys and values of all rows into the pool, then the decoded rows' attention into `out` [1, N, H, D]."""
    from loramux.ops import paged_triton_kernels

    dtype = kv.keys_BGDTP.dtype
    if not (query.dtype is dtype and key.dtype is dtype and value.dtype is dtype):
        raise ValueError(
            f"attention got {query.dtype}, {key.dtype} and {value.dtype}, but the KV pool holds {dtype}; "
            "load the model and make the pool in one dtype, without autocast"
        )
    paged_triton_kernels.write(key[0], value[0], kv, rows.slot_N)
    table = table_of(rows)
    if table.row_S.shape[0]:
        paged_triton_kernels.decode(query[0], kv, table, out[0])


def table_of(rows: PagedRows) -> DecodeTable:
    """Made once per step and shared by its layers; a captured step brings its own."""
    held = rows.cache.get(KEY)
    if not isinstance(held, DecodeTable):
        held = rows.cache[KEY] = _lay_out(rows)
    return held


def _lay_out(rows: PagedRows) -> DecodeTable:
    device = rows.slot_N.device
    begin_S, count_S = rows.begin_S[:-1], rows.begin_S.diff()
    width = int(count_S.max()) if count_S.shape[0] else 0
    place_SW = begin_S[:, None] + torch.arange(width).clamp_max(count_S[:, None] - 1)
    blocks_SW = rows.blocks[place_SW.long().to(device)].int()
    return DecodeTable(rows.row_S.to(device), rows.length_S.to(device), blocks_SW)
