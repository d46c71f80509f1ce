"""Pairs sorted by slot, one matrix product per active slot: for many slots of which each pair uses one.

Why: the dense form computes every slot for every row. Here the work is that of the pairs alone, paid with a gather of
their rows of x. The sort is worked out once per route. On CUDA in bf16 one grouped product replaces the loop.

Letters: P pairs in sorted order, G active slots, r rank of a slot (padded to the widest where grouped), I, O widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.contract import Pairs, Spans

HAS_GROUPED_MM = hasattr(functional, "grouped_mm")  # torch 2.10 on
ALIGN = 8  # bf16 entries in 16 bytes: the grouped product wants every row to start on such a border


@dataclass(frozen=True, eq=False)
class Segments:
    """The pairs of a route by slot. order: pairs, without padding; ends[g]: one past the last pair of slots[g]."""

    order: Tensor
    src: Tensor
    dst: Tensor
    slots: tuple[int, ...]
    ends: tuple[int, ...]


def apply(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    spans: Spans,
    pairs: Pairs,
    *,
    one_product: bool | None = None,
) -> Tensor:
    """The contract. `one_product` forces (True) or forbids (False) the grouped product; None asks the device."""
    segments = _segments(pairs)
    if not segments.slots or spans.max_rank == 0:
        return y
    x_PI = x.index_select(0, segments.src)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate_P = pairs.weight.index_select(0, segments.order).to(wide)
    rank_PR = (
        None if pairs.rank_weight is None else pairs.rank_weight.index_select(0, segments.order)
    )
    if one_product is None:
        one_product = x.device.type == "cuda" and x.dtype is torch.bfloat16 and HAS_GROUPED_MM
    a, b = a.to(x.dtype), b.to(y.dtype)
    if one_product:
        out_PO = _product(x_PI, a, b, spans, segments, gate_P, rank_PR)
    else:
        out_PO = _loop(x_PI, a, b, spans, segments, gate_P, rank_PR)
    return y.index_add(0, segments.dst, out_PO)


def _segments(pairs: Pairs) -> Segments:
    held = pairs.cache.get("grouped")
    if held is None:
        slot_P, order = pairs.slot.sort(stable=True)
        slots, counts = slot_P.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        slots_seen = slots.tolist()
        skip = ends[0] if slots_seen and slots_seen[0] < 0 else 0
        kept = order[skip:]
        held = pairs.cache["grouped"] = Segments(
            order=kept,
            src=pairs.src.index_select(0, kept),
            dst=pairs.dst.index_select(0, kept),
            slots=tuple(slots_seen[1:] if skip else slots_seen),
            ends=tuple(end - skip for end in (ends[1:] if skip else ends)),
        )
    return cast(Segments, held)


def _loop(
    x_PI: Tensor,
    a: Tensor,
    b: Tensor,
    spans: Spans,
    segments: Segments,
    gate_P: Tensor,
    rank_PR: Tensor | None,
) -> Tensor:
    outs, begin = [], 0
    for slot, end in zip(segments.slots, segments.ends, strict=True):
        rows = slice(spans.start[slot], spans.start[slot] + spans.rank[slot])
        t = functional.linear(x_PI[begin:end], a[rows])
        gate = spans.scale[slot] * gate_P[begin:end, None]
        if rank_PR is not None:
            gate = gate * rank_PR[begin:end, : spans.rank[slot]]
        outs.append((t * gate).to(t.dtype) @ b[rows])
        begin = end
    return torch.cat(outs)


def _product(
    x_PI: Tensor,
    a: Tensor,
    b: Tensor,
    spans: Spans,
    segments: Segments,
    gate_P: Tensor,
    rank_PR: Tensor | None,
) -> Tensor:
    """Ranks are padded to one width; a padded rank reads some other row of A and is gated with zero."""
    width = -(-spans.max_rank // ALIGN) * ALIGN
    device = x_PI.device
    slots = torch.tensor(segments.slots)
    start, rank, scale = (column[slots] for column in spans.table)
    column = torch.arange(width)
    rows_Gr = (start[:, None] + column).clamp(max=a.shape[0] - 1).to(device)
    real_Gr = (column < rank[:, None]) * scale[:, None]
    ends = torch.tensor(segments.ends, dtype=torch.int32)
    group_P = torch.repeat_interleave(
        torch.arange(len(slots)), torch.diff(ends, prepend=ends.new_zeros(1))
    )
    gate_Pr = real_Gr[group_P].to(device) * gate_P[:, None]
    if rank_PR is not None:
        gate_Pr = (
            gate_Pr * functional.pad(rank_PR, (0, max(0, width - rank_PR.shape[1])))[:, :width]
        )
    offsets = ends.to(device)
    t_Pr = functional.grouped_mm(x_PI, a[rows_Gr].transpose(1, 2), offs=offsets)
    return functional.grouped_mm((t_Pr * gate_Pr).to(t_Pr.dtype), b[rows_Gr], offs=offsets)
