"""The contract on a GPU: two Triton kernels, shrink over pairs and expand over destinations. Inference only.

Why two: the shrunk rows t = A x are tiny, and expanding by destination needs no atomic addition, so equal inputs give
equal bits. Triton is imported on first use only.

Letters: P pairs, D destination rows, r widest rank of a slot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from loramux.ops.contract import Pairs, Spans


def is_interpreted() -> bool:
    """Triton then runs its kernels in Python, on any device: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def apply(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans, pairs: Pairs) -> Tensor:
    """The contract. Writes into y."""
    from loramux.ops import triton_kernels

    learned = (x, a, b, pairs.weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        raise ValueError(
            "the triton kernels have no gradient; use torch.no_grad(), or the reference backend"
        )
    if pairs.num_pairs == 0 or spans.max_rank == 0:
        return y
    y, x = y.contiguous(), x.contiguous()
    a, b = a.contiguous(), b.contiguous()
    table, route = _tables_on(spans, pairs, x.device), _by_destination(pairs)
    t_Pr = torch.empty(pairs.num_pairs, spans.max_rank, dtype=torch.float32, device=x.device)
    triton_kernels.shrink(t_Pr, x, a, table, pairs)
    triton_kernels.expand(y, t_Pr, b, table, route, pairs)
    return y


@dataclass(frozen=True, eq=False)
class Destinations:
    """Pairs by destination: order[begin[d]..begin[d+1]) are those of row d, in their given order."""

    order: Tensor
    begin: Tensor


def _by_destination(pairs: Pairs) -> Destinations:
    held = pairs.cache.get("triton")
    if held is None:
        order = torch.argsort(pairs.dst, stable=True).to(torch.int32)
        count = torch.bincount(pairs.dst, minlength=pairs.num_dst)
        begin = torch.zeros(pairs.num_dst + 1, dtype=torch.int32, device=pairs.dst.device)
        begin[1:] = count.cumsum(0)
        held = pairs.cache["triton"] = Destinations(order, begin)
    return cast(Destinations, held)


def _tables_on(spans: Spans, pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    key = ("triton", spans)
    held = pairs.cache.get(key)
    if held is None:
        start, rank, scale = spans.table
        held = pairs.cache[key] = (start.to(device), rank.to(device), scale.to(device))
    return cast("tuple[Tensor, Tensor, Tensor]", held)
