"""Attention over keys and values that lie in blocks of a pool: the definition in torch, one call of C (paged.c) on a
CPU, Triton on a GPU (paged_triton.py).

Both lie in a block as the kernel multiplies them, in pairs where numbers are bf16: two neighbours of a key side by
side, then those of the next token; two tokens' values side by side, then the next numbers.

Letters: N tokens of a step, H query heads, G key/value heads, D head width, P numbers side by side (2 of bf16, else
1), C tokens of context, B blocks, T tokens of a block, S sequences that are decoded (one token each).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.paged_kernel import (
    ERRORS,
    HeldLayer,
    HeldRows,
    fits,
    hold_layer,
    hold_rows,
    kernel,
)
from loramux.ops.paged_triton import attend_decodes, runs_triton


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One layer's part of the pool, and how it attends. `window`: a token sees that many tokens, itself included."""

    keys_BGDTP: Tensor  # [B, G, D / P, T, P]
    values_BGTDP: Tensor  # [B, G, T / P, D, P]
    scale: float
    window: int | None = None
    softcap: float | None = None
    cache: dict[str, object] = field(default_factory=dict)

    @property
    def block_size(self) -> int:
        return self.keys_BGDTP.shape[3]


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows first..end-1: tokens of one prompt, from position `start` on, in a sequence that has these blocks."""

    first: int
    end: int
    start: int
    blocks: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Tokens of the sequence up to the last one here."""
        return self.start + self.end - self.first


@dataclass(frozen=True, eq=False)
class PagedRows:
    """Where the tokens of a step go, and what they read.

    slot_N: block * T + place in it. Decode s is row `row_S[s]` and sees `length_S[s]` tokens, itself the last one,
    which lie in `blocks[begin_S[s]:begin_S[s + 1]]`.
    """

    slot_N: Tensor  # int64
    row_S: Tensor  # int32
    length_S: Tensor
    begin_S: Tensor  # [S + 1]
    blocks: Tensor
    pieces: tuple[Piece, ...] = ()
    cache: dict[str, object] = field(default_factory=dict)

    @property
    def num_decodes(self) -> int:
        return int(self.row_S.shape[0])


def make_pools(
    num_blocks: int, heads: int, block_size: int, key_dim: int, value_dim: int,
    dtype: torch.dtype, device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values of one layer, not initialised."""
    is_paired = dtype is torch.bfloat16
    key_pack = 2 if is_paired and key_dim % 2 == 0 else 1
    value_pack = 2 if is_paired and block_size % 2 == 0 else 1
    keys = (num_blocks, heads, key_dim // key_pack, block_size, key_pack)
    values = (num_blocks, heads, block_size // value_pack, value_dim, value_pack)
    return (
        torch.empty(keys, dtype=dtype, device=device),
        torch.empty(values, dtype=dtype, device=device),
    )


def write_torch(key_GND: Tensor, value_GND: Tensor, kv: LayerKV, rows: PagedRows) -> None:
    """Put new keys and values where they belong."""
    block_N, place_N = rows.slot_N // kv.block_size, rows.slot_N % kv.block_size
    key_parts = (kv.keys_BGDTP.shape[2], kv.keys_BGDTP.shape[4])
    kv.keys_BGDTP[block_N, :, :, place_N] = key_GND.transpose(0, 1).unflatten(2, key_parts)
    pack = kv.values_BGTDP.shape[4]
    pair_N, side_N = place_N // pack, place_N % pack
    kv.values_BGTDP[block_N, :, pair_N, :, side_N] = value_GND.transpose(0, 1)


def gather(kv: LayerKV, blocks: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values [G, end - start, D]: tokens start..end-1 of the sequence that has these blocks.

    Cut to the exact length: what lies behind it in the last block may be anything, NaN included.
    """
    size = kv.block_size
    first = start // size
    own = blocks[first : -(-end // size)].long()
    keys = kv.keys_BGDTP[own].permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)
    values = kv.values_BGTDP[own].permute(1, 0, 2, 4, 3).flatten(1, 3)
    cut = slice(start - first * size, end - first * size)
    return keys[:, cut], values[:, cut]


def attend_dense(
    query_HND: Tensor,
    key_GCD: Tensor,
    value_GCD: Tensor,
    scale: float,
    mask_NC: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[N, H, D], softmax in fp32. `mask_NC`: True where a token may look."""
    if softcap is None:
        mask = None if mask_NC is None else mask_NC[None, None]
        out = functional.scaled_dot_product_attention(
            query_HND[None], key_GCD[None], value_GCD[None],
            attn_mask=mask, scale=scale, enable_gqa=query_HND.shape[0] != key_GCD.shape[0],
        )  # fmt: skip
        return out[0].transpose(0, 1)
    group, dtype = query_HND.shape[0] // key_GCD.shape[0], value_GCD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    key_HCD = key_GCD.repeat_interleave(group, 0).to(wide)
    score_HNC = query_HND.to(wide) @ key_HCD.transpose(1, 2) * scale
    score_HNC = torch.tanh(score_HNC / softcap) * softcap
    if mask_NC is not None:
        score_HNC = score_HNC.masked_fill(~mask_NC, -torch.inf)
    value_HCD = value_GCD.repeat_interleave(group, 0).to(wide)
    return (score_HNC.softmax(-1) @ value_HCD).to(dtype).transpose(0, 1)


def decode_torch(query_HND: Tensor, kv: LayerKV, rows: PagedRows, out_NHD: Tensor) -> None:
    """Attention of the decoded rows, one sequence after the other: no row's bits depend on the others."""
    numbers = zip(
        rows.row_S.tolist(), rows.length_S.tolist(), rows.begin_S.tolist()[:-1], strict=True
    )
    for row, length, begin in numbers:
        blocks = rows.blocks[begin:]
        start = 0 if kv.window is None else max(0, length - kv.window)
        out_NHD[row : row + 1] = attend_dense(
            query_HND[:, row : row + 1],
            *gather(kv, blocks, start, length),
            kv.scale,
            softcap=kv.softcap,
        )


def piece_torch(query: Tensor, key: Tensor, value: Tensor, kv: LayerKV, piece: Piece) -> Tensor:
    """[n, H, D]: attention of a piece of a prompt, after its keys and values were written."""
    rows = slice(piece.first, piece.end)
    begin = 0 if kv.window is None else max(0, piece.start - kv.window + 1)
    if piece.start == 0:
        key_GCD, value_GCD = key[0, :, rows], value[0, :, rows]
    else:
        key_GCD, value_GCD = gather(kv, piece.blocks, begin, piece.total)
    query_HND = query[0, :, rows]
    sees_all = kv.window is None or piece.total <= kv.window
    if piece.start == 0 and sees_all and kv.softcap is None:
        out = functional.scaled_dot_product_attention(
            query_HND[None], key_GCD[None], value_GCD[None], is_causal=True, scale=kv.scale,
            enable_gqa=query_HND.shape[0] != key_GCD.shape[0],
        )  # fmt: skip
        return out[0].transpose(0, 1)
    mask_NC = piece.masks.get(kv.window)
    if mask_NC is None:
        query_N = torch.arange(piece.start, piece.total, device=query.device)[:, None]
        key_C = torch.arange(begin, piece.total, device=query.device)
        mask_NC = key_C <= query_N
        if kv.window is not None:
            mask_NC &= query_N - key_C < kv.window
        piece.masks[kv.window] = mask_NC
    return attend_dense(query_HND, key_GCD, value_GCD, kv.scale, mask_NC, kv.softcap)


def attend(query: Tensor, key: Tensor, value: Tensor, kv: LayerKV, rows: PagedRows) -> Tensor:
    """Writes keys and values of all tokens into the pool, then attends: [1, N, H, D].

    query [1, H, N, D], key and value [1, G, N, D] with any strides. In the kernel where it runs, else in torch.
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    layer = kv.cache.get("kernel")
    if layer is None:
        layer = kv.cache["kernel"] = _choose(kv, query.shape[1])
    if layer == "triton":
        attend_decodes(query, key, value, kv, rows, out)
    elif isinstance(layer, HeldLayer):
        _attend_in_kernel(query, key, value, kv, rows, out, layer)
        if layer.takes_pieces:
            return out
    else:
        write_torch(key[0], value[0], kv, rows)
        decode_torch(query[0], kv, rows, out[0])
    for piece in rows.pieces:
        out[0, piece.first : piece.end] = piece_torch(query, key, value, kv, piece)
    return out


def _choose(kv: LayerKV, num_heads: int) -> HeldLayer | str:
    if runs_triton(kv):
        return "triton"
    return hold_layer(kv, num_heads) if fits(kv) else "torch"


def _attend_in_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: LayerKV,
    rows: PagedRows,
    out: Tensor,
    layer: HeldLayer,
) -> None:
    held, dtype = rows.cache.get("cpu"), kv.keys_BGDTP.dtype
    if not isinstance(held, HeldRows):
        held = rows.cache["cpu"] = hold_rows(rows, kv.keys_BGDTP.shape[0], kv.block_size)
    if query.shape[2] != rows.slot_N.shape[0]:
        raise ValueError(f"{query.shape[2]} rows for a step of {rows.slot_N.shape[0]} tokens")
    if not (query.dtype is dtype and key.dtype is dtype and value.dtype is dtype):
        raise ValueError(
            f"attention got {query.dtype}, {key.dtype} and {value.dtype}, but the KV pool holds {dtype}; "
            "load the model and make the pool in one dtype, without autocast"
        )
    (_, q_head, q_token, q_last), (_, k_head, k_token, k_last) = query.stride(), key.stride()
    _, v_head, v_token, v_last = value.stride()
    if q_last != 1 or k_last != 1 or v_last != 1:
        solid = query.contiguous(), key.contiguous(), value.contiguous()
        _attend_in_kernel(*solid, kv, rows, out, layer)
        return
    call = kernel().attend
    assert call is not None
    error = call(
        layer.address, held.address,
        query.data_ptr(), q_head, q_token, key.data_ptr(), k_head, k_token,
        value.data_ptr(), v_head, v_token, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if error:
        raise ValueError(f"paged kernel: {ERRORS[error]}")
