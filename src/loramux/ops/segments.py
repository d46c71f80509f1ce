"""A frozen linear with another LoRA for every segment of its rows, forward and backward in one autograd function.

    y[s] = W x[s] + bias + scale_s B_s^T (A_s x[s])          for the rows s of every segment

    dA_s = (scale_s dy[s] B_s)^T x[s]      dB_s = scale_s (A_s x[s])^T dy[s]
    dx   = dy W, then dx[s] += (scale_s dy[s] B_s) A_s

Why written out: in pieces that autograd joins, every segment costs a view, an addition and a copy of its rows in both
directions, and the outputs of all segments are copied once more into one. Here W is multiplied once per direction and
the rest is added in place. Of the forward pass x and t = A x are kept; a frozen W needs neither. Neighbours with as
many rows and ranks are one batched product: on CPU that takes half the time of a product each.

Letters: N rows, K segments of a batch, n rows of each, R ranks of each, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Segment:
    """The next `num_rows` rows, and their adapter: a [R, I] and b [R, O]; None for the bare linear."""

    num_rows: int
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


@dataclass(frozen=True)
class _Batch:
    """Neighbouring segments that are one batched product: rows first..first + num * count - 1."""

    first: int
    num: int
    count: int
    rank: int
    scale: float

    def rows_of(self, x_NI: Tensor) -> Tensor:
        """[K, n, I], or [n, I] of a single segment; a view."""
        rows = x_NI[self.first : self.first + self.num * self.count]
        return rows if self.num == 1 else rows.view(self.num, self.count, -1)

    def add(self, y_NO: Tensor, t: Tensor, b: Tensor, scale: float) -> None:
        """y += scale t b for these rows, in place."""
        rows = self.rows_of(y_NO)
        if self.num == 1:
            rows.addmm_(t, b, alpha=scale)
        else:
            rows.baddbmm_(t, b, alpha=scale)

    def each(self, stacked: Tensor) -> Sequence[Tensor]:
        """What belongs to each segment."""
        return (stacked,) if self.num == 1 else stacked.unbind()


def linear(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: Sequence[Segment]
) -> Tensor:
    """[N, O]. Rows of A and B are rounded to the dtype of x, as every backend does; their gradients are wide."""
    if sum(segment.num_rows for segment in segments) != x_NI.shape[0]:
        raise ValueError(
            f"segments of {[segment.num_rows for segment in segments]} rows do not make up {x_NI.shape[0]} rows"
        )
    batches, rows_a, rows_b = _batches(segments)
    return cast(Tensor, _Linear.apply(x_NI, weight_OI, bias_O, batches, *rows_a, *rows_b))


def _batches(segments: Sequence[Segment]) -> tuple[tuple[_Batch, ...], list[Tensor], list[Tensor]]:
    batches, rows_a, rows_b = [], [], []
    first = 0
    for key, group in groupby(segments, key=lambda s: (s.num_rows, s.rank, s.scale)):
        own = list(group)
        count, rank, scale = key
        if rank and count:
            batches.append(_Batch(first, len(own), count, rank, scale))
            rows_a += [segment.a for segment in own if segment.a is not None]
            rows_b += [segment.b for segment in own if segment.b is not None]
        first += len(own) * count
    return tuple(batches), rows_a, rows_b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        batches: tuple[_Batch, ...],
        *rows: Tensor,
    ) -> Tensor:
        y_NO = functional.linear(x_NI, weight_OI, bias_O)
        num = len(rows) // 2
        kept: list[Tensor] = []
        at = 0
        for batch in batches:
            a = _stack(rows[at : at + batch.num], x_NI.dtype)
            b = _stack(rows[num + at : num + at + batch.num], y_NO.dtype)
            t = batch.rows_of(x_NI) @ a.mT
            batch.add(y_NO, t, b, batch.scale)
            kept += (a, b, t)
            at += batch.num
        ctx.save_for_backward(x_NI, weight_OI, *kept)
        ctx.batches = batches
        ctx.dtypes = [tensor.dtype for tensor in rows]
        return y_NO

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, *kept = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_x = grad_NO @ weight_OI if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[4:]
        num = len(wanted) // 2
        grads_a: list[Tensor | None] = []
        grads_b: list[Tensor | None] = []
        each = iter(kept)
        for batch in ctx.batches:
            a, b, t = next(each), next(each), next(each)
            grad_y = batch.rows_of(grad_NO)
            grad_t = (grad_y @ b.mT).mul_(batch.scale)
            at = len(grads_a)
            if any(wanted[at : at + batch.num]):
                grad_a = grad_t.mT @ batch.rows_of(x_NI)
                grads_a += batch.each(grad_a.to(ctx.dtypes[at]))
            else:
                grads_a += [None] * batch.num
            if any(wanted[num + at : num + at + batch.num]):
                grad_b = (t.mT @ grad_y).to(ctx.dtypes[num + at])
                grads_b += batch.each(grad_b.mul_(batch.scale))
            else:
                grads_b += [None] * batch.num
            if grad_x is not None:
                batch.add(grad_x, grad_t, a, 1.0)
        return (grad_x, None, None, None, *grads_a, *grads_b)


def _stack(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[K, R, ...] in this dtype; [R, ...] of a single segment."""
    return (rows[0] if len(rows) == 1 else torch.stack(tuple(rows))).to(dtype)
