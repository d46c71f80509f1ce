"""A frozen linear with another LoRA for every segment of its rows, forward and backward in one autograd function.

    y[s] = W x[s] + bias + scale_s B_s^T (A_s x[s])          for the rows s of every segment

    dA_s = (scale_s dy[s] B_s)^T x[s]      dB_s = scale_s (A_s x[s])^T dy[s]
    dx   = dy W, then dx[s] += (scale_s dy[s] B_s) A_s

Why written out: in pieces that autograd joins, every segment costs a view, an addition and a copy of its rows in both
directions, and the outputs of all segments are copied once more into one. Here W is multiplied once per direction and
the rest is added in place. Of the forward pass x and t = A x are kept; a frozen W needs neither.

Letters: N rows, n rows of a segment, R ranks of its adapter, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def linear(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: Sequence[Segment]
) -> Tensor:
    """[N, O]. Rows of A and B are rounded to the dtype of x, as every backend does; their gradients are wide."""
    if sum(segment.num_rows for segment in segments) != x_NI.shape[0]:
        raise ValueError(
            f"segments of {[segment.num_rows for segment in segments]} rows do not make up {x_NI.shape[0]} rows"
        )
    layout = tuple((s.num_rows, s.scale, s.a is not None) for s in segments)
    rows = [tensor for s in segments if s.a is not None for tensor in (s.a, s.b)]
    return cast(Tensor, _Linear.apply(x_NI, weight_OI, bias_O, layout, *rows))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        layout: tuple[tuple[int, float, bool], ...],
        *rows: Tensor,
    ) -> Tensor:
        y_NO = functional.linear(x_NI, weight_OI, bias_O)
        kept: list[Tensor] = []
        first, each = 0, iter(rows)
        for count, scale, has_adapter in layout:
            if has_adapter:
                a, b = next(each).to(x_NI.dtype), next(each).to(y_NO.dtype)
                t_nR = x_NI[first : first + count] @ a.T
                y_NO[first : first + count].addmm_(t_nR, b, alpha=scale)
                kept += (a, b, t_nR)
            first += count
        ctx.save_for_backward(x_NI, weight_OI, *kept)
        ctx.layout = layout
        ctx.dtypes = [tensor.dtype for tensor in rows]
        return y_NO

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, *kept = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        grad_x = grad_NO @ weight_OI if wants_x else None
        grads: list[Tensor | None] = []
        first, each = 0, iter(kept)
        for count, scale, has_adapter in ctx.layout:
            own = slice(first, first + count)
            first += count
            if not has_adapter:
                continue
            a, b, t_nR = next(each), next(each), next(each)
            grad_nO = grad_NO[own]
            grad_t = (grad_nO @ b.T).mul_(scale)
            at = 4 + len(grads)
            grads.append(
                (grad_t.T @ x_NI[own]).to(ctx.dtypes[at - 4]) if ctx.needs_input_grad[at] else None
            )
            grads.append(
                (t_nR.T @ grad_nO).to(ctx.dtypes[at - 3]).mul_(scale)
                if ctx.needs_input_grad[at + 1]
                else None
            )
            if grad_x is not None:
                grad_x[own].addmm_(grad_t, a)
        return (grad_x, None, None, None, *grads)
