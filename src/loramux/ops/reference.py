"""The definition of the contract: dense, masked, differentiable. Every other backend is tested against it.

Why it is also fast: a source row is shrunk once for all experts together, gates are a mask over rank rows, and one
matrix product expands. Nothing wider than R is gathered or scattered. What depends on the route and the spans alone
is worked out once and shared by all sites under the route.

Letters: S source rows, D destination rows, P pairs, R rank rows in use, r rank columns of rank_weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.contract import Pairs, Spans
from loramux.ops.rows import fold_rows, to_rows, uniform_copies

__all__ = ["apply", "fold_rows", "to_rows"]


def apply(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans, pairs: Pairs) -> Tensor:
    """y[dst] += scale * weight * B^T (rank_weight * (A x[src])). Writes into y where autograd allows it."""
    plan = plan_for(spans, pairs, x.dtype)
    if plan.start or plan.stop != a.shape[0]:
        a, b = a[plan.start : plan.stop], b[plan.start : plan.stop]
    if a.shape[0] == 0 or y.shape[0] == 0 or pairs.num_pairs == 0:
        return y
    # Under autocast t and y are narrower than x; the sum happens in y's dtype.
    u_DR, b = plan.gate(functional.linear(x, a.to(x.dtype))).to(y.dtype), b.to(y.dtype)
    if torch.is_grad_enabled() and (y._is_view() or (y.is_leaf and y.requires_grad)):
        return torch.addmm(y, u_DR, b, alpha=plan.scale)
    return y.addmm_(u_DR, b, alpha=plan.scale)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a route does to the shrunk rows t = A x.

    Rank rows start..stop-1 are in use; the product is multiplied by `scale` and, where given, by `mask`, which
    broadcasts to [P, R]. src and dst are None where pair p reads or writes row p.
    """

    start: int
    stop: int
    scale: float
    mask: Tensor | None
    src: Tensor | None
    dst: Tensor | None
    num_dst: int

    def gate(self, t_SR: Tensor) -> Tensor:
        u_PR = t_SR if self.src is None else t_SR.index_select(0, self.src)
        if self.mask is not None:
            u_PR = u_PR * self.mask
        if self.dst is None:
            return u_PR
        return u_PR.new_zeros(self.num_dst, u_PR.shape[1]).index_add(0, self.dst, u_PR)


def plan_for(spans: Spans, pairs: Pairs, dtype: torch.dtype) -> Plan:
    """The plan of this route for sites with these spans; made once."""
    learned = pairs.weight.requires_grad or (
        pairs.rank_weight is not None and pairs.rank_weight.requires_grad
    )
    # A mask made without gradients must not serve a forward pass that needs them, nor one made in inference mode.
    mode = (learned and torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    key = ("reference", spans, dtype, mode)
    plan = pairs.cache.get(key)
    if plan is None:
        plan = pairs.cache[key] = _make_plan(spans, pairs, dtype)
    return cast(Plan, plan)


def _make_plan(spans: Spans, pairs: Pairs, dtype: torch.dtype) -> Plan:
    slots = range(spans.num_slots) if pairs.one_slot is None else (pairs.one_slot,)
    scales = {spans.scale[slot]: None for slot in slots if spans.rank[slot]}
    scale = next(iter(scales)) if len(scales) == 1 else 1.0
    start = 0 if pairs.one_slot is None else spans.start[pairs.one_slot]
    stop = spans.num_rows if pairs.one_slot is None else start + spans.rank[pairs.one_slot]
    # Gates are combined in fp32 (fp64 for fp64 rows) and rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    mask_PR = _mask(spans, pairs, wide, with_scale=len(scales) > 1)
    src, dst = _index(pairs.src, pairs.num_src, pairs), _index(pairs.dst, pairs.num_dst, pairs)
    if src is not None and dst is not None and _same_rows(pairs):
        # t[src] * mask summed over src is t times the summed mask: no gather at any site.
        shape = (pairs.num_dst, mask_PR.shape[1])
        mask_PR, src, dst = mask_PR.new_zeros(shape).index_add(0, pairs.dst, mask_PR), None, None
    mask = None if _is_one(mask_PR) else mask_PR.to(dtype)
    return Plan(start, stop, scale, mask, src, dst, pairs.num_dst)


def _mask(spans: Spans, pairs: Pairs, dtype: torch.dtype, with_scale: bool) -> Tensor:
    """Gate of every pair for every rank row in use, [P, R], or [P, 1] where rows do not differ."""
    weight_P1 = pairs.weight.to(dtype).unsqueeze(1)
    if pairs.one_slot is not None:
        rank = spans.rank[pairs.one_slot]
        return (
            weight_P1
            if pairs.rank_weight is None
            else weight_P1 * pairs.rank_weight[:, :rank].to(dtype)
        )
    slot_R = spans.row_slot_R.to(pairs.slot.device)
    mine_PR = (slot_R == pairs.slot.unsqueeze(1)) & (slot_R >= 0)
    gate_PR = weight_P1 * mine_PR
    if with_scale:
        scale = [spans.scale[slot] if slot >= 0 else 0.0 for slot in spans.row_slot_R.tolist()]
        gate_PR = gate_PR * torch.tensor(scale, dtype=dtype, device=gate_PR.device)
    if pairs.rank_weight is not None:
        gate_PR = gate_PR * pairs.rank_weight.to(dtype).index_select(
            1, _place_in_slot(spans).to(gate_PR.device)
        )
    return gate_PR


def _place_in_slot(spans: Spans) -> Tensor:
    """How many-th row of its slot every rank row is; 0 where no slot owns it."""
    starts = [
        spans.start[slot] if slot >= 0 else row
        for row, slot in enumerate(spans.row_slot_R.tolist())
    ]
    return torch.arange(spans.num_rows) - torch.tensor(starts, dtype=torch.long)


def _index(index: Tensor, count: int, pairs: Pairs) -> Tensor | None:
    if pairs.identity or uniform_copies(index, count) == 1:
        return None
    return index


def _same_rows(pairs: Pairs) -> bool:
    if pairs.num_src != pairs.num_dst:
        return False
    return pairs.src is pairs.dst or (
        pairs.src.device.type == "cpu" and torch.equal(pairs.src, pairs.dst)
    )


def _is_one(mask: Tensor) -> bool:
    # On an accelerator the look would wait for the device; there the product costs less.
    return not mask.requires_grad and mask.device.type == "cpu" and bool((mask == 1).all())
