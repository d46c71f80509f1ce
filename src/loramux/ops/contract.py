"""The one kernel contract: what every backend computes, and the types it is given.

Why here: backends know nothing of routers, adapters or models. Whatever a method decides ends up as a flat
list of pairs, and every site in every mode is one call.

    apply(y, x, a, b, spans, pairs):   y[dst] += scale * weight * B^T (rank_weight * (A x[src]))

Letters: S source rows, D destination rows, P pairs, R rank rows of the site, E slots (experts of the site),
M FFN rows (one per token and chosen expert), I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Which rank rows of a site belong to which slot, and the constant each slot is scaled with.

    A slot of rank 0 is legal: the adapter does not touch this site.
    """

    start: tuple[int, ...]
    rank: tuple[int, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.start) == len(self.rank) == len(self.scale):
            raise ValueError("start, rank and scale must have one entry per slot")

    @classmethod
    def packed(cls, ranks: Sequence[int], scales: Sequence[float]) -> Spans:
        """Slots laid one after the other, in order."""
        start, at = [], 0
        for rank in ranks:
            start.append(at)
            at += rank
        return cls(tuple(start), tuple(ranks), tuple(scales))

    @property
    def num_slots(self) -> int:
        return len(self.start)

    @cached_property
    def num_rows(self) -> int:
        return max((s + r for s, r in zip(self.start, self.rank, strict=True)), default=0)

    @cached_property
    def max_rank(self) -> int:
        return max(self.rank, default=0)

    @cached_property
    @torch.inference_mode(False)
    def row_slot_R(self) -> Tensor:
        """Slot of every rank row; -1 where no slot owns the row."""
        slot_R = torch.full((self.num_rows,), -1, dtype=torch.long)
        for slot, (start, rank) in enumerate(zip(self.start, self.rank, strict=True)):
            slot_R[start : start + rank] = slot
        return slot_R

    @cached_property
    @torch.inference_mode(False)
    def row_scale_R(self) -> Tensor:
        """fp32 scale of every rank row."""
        scale_R = torch.zeros(self.num_rows, dtype=torch.float32)
        for start, rank, scale in zip(self.start, self.rank, self.scale, strict=True):
            scale_R[start : start + rank] = scale
        return scale_R

    @cached_property
    @torch.inference_mode(False)
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """(start, rank, scale) as CPU tensors (int32, int32, fp32) for compiled kernels."""
        return (
            torch.tensor(self.start, dtype=torch.int32),
            torch.tensor(self.rank, dtype=torch.int32),
            torch.tensor(self.scale, dtype=torch.float32),
        )


@dataclass(eq=False)
class Pairs:
    """A flat list of (source row, slot, destination row) with a weight each.

    src, dst, slot: int32 [P] (slot -1 is padding and contributes nothing); weight: fp32 [P], may carry a gradient;
    rank_weight: fp32 [P, r_max] or None, entry [p, i] gates the i-th rank row of slot[p].
    `identity` promises P == S == D and src == dst == 0..P-1; `one_slot` promises that every pair names that slot.
    """

    src: Tensor
    dst: Tensor
    slot: Tensor
    weight: Tensor
    num_src: int
    num_dst: int
    rank_weight: Tensor | None = None
    identity: bool = False
    one_slot: int | None = None
    cache: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def num_pairs(self) -> int:
        return int(self.src.shape[0])


@dataclass(eq=False)
class RowMap:
    """How FFN rows belong to tokens: row m is a copy of token[m] and folds back with weight[m].

    token: int32 [M]; weight: fp32 [M], may carry a gradient. Every token owns at least one row.
    `uniform` K promises that row m belongs to token m // K.
    """

    token: Tensor
    weight: Tensor
    num_tokens: int
    uniform: int | None = None
    cache: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        return int(self.token.shape[0])
