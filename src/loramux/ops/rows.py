"""Tokens to FFN rows and back: copy each token once per chosen expert, fold the copies with their weights.

Why apart from the LoRA itself: these are the only wide tensors that the row axis moves, so they decide what a mixture
inside an FFN costs. Tokens that all own K rows in a row need no index at all.

Letters: N tokens, M FFN rows, K rows per token, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loramux.ops.contract import RowMap


def to_rows(y_ND: Tensor, rows: RowMap) -> Tensor:
    """Row m is a copy of token[m]; [M, D]."""
    k = rows_per_token(rows)
    if k is None:
        return y_ND.index_select(0, rows.token)
    # Not expand: its backward is a strided sum over K, which torch does 8 times slower in bf16 on CPU.
    return torch.stack((y_ND,) * k, dim=1).view(-1, y_ND.shape[-1]) if k > 1 else y_ND


def fold_rows(x_MD: Tensor, rows: RowMap) -> Tensor:
    """Token n is the sum of weight[m] * x[m] over its rows; [N, D]."""
    weight_M = rows.weight.to(x_MD.dtype)
    k = rows_per_token(rows)
    if k is None:
        empty = x_MD.new_zeros(rows.num_tokens, x_MD.shape[-1])
        return empty.index_add(0, rows.token, x_MD * weight_M.unsqueeze(-1))
    return cast(Tensor, _Fold.apply(x_MD, weight_M.view(-1, k)))


def rows_per_token(rows: RowMap) -> int | None:
    """K if rows n*K .. n*K+K-1 are token n's for every n, else None; promised, or looked up once per map."""
    if rows.uniform is not None:
        return rows.uniform
    if "uniform" not in rows.cache:
        rows.cache["uniform"] = uniform_copies(rows.token, rows.num_tokens)
    return cast("int | None", rows.cache["uniform"])


def uniform_copies(index: Tensor, count: int) -> int | None:
    """K if `index` is 0..count-1, each K times in a row. None on other devices than cpu: looking would stall them."""
    if index.device.type != "cpu" or count == 0 or index.shape[0] == 0 or index.shape[0] % count:
        return None
    k = index.shape[0] // count
    ascending = torch.arange(count, dtype=index.dtype)
    return k if torch.equal(index, ascending.repeat_interleave(k) if k > 1 else ascending) else None


class _Fold(torch.autograd.Function):
    """sum over K of w[n, k] * x[n, k]. Written out: torch's own forms take 1.4 to 2.5 times as long on CPU."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, w_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, w_NK)
        x_NKD = x_MD.view(*w_NK.shape, -1)
        out_ND = x_NKD[:, 0] * w_NK[:, :1]
        for k in range(1, w_NK.shape[1]):
            out_ND.addcmul_(x_NKD[:, k], w_NK[:, k : k + 1])
        return out_ND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MD, w_NK = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_NKD = grad_ND.new_empty(*w_NK.shape, grad_ND.shape[-1])
            for k in range(w_NK.shape[1]):
                torch.mul(grad_ND, w_NK[:, k : k + 1], out=grad_NKD[:, k])
            grad_x = grad_NKD.view(x_MD.shape)
        if ctx.needs_input_grad[1]:
            x_NKD = x_MD.view(*w_NK.shape, -1)
            dots = [torch.linalg.vecdot(x_NKD[:, k], grad_ND) for k in range(w_NK.shape[1])]
            grad_w = torch.stack(dots, dim=1)
        return grad_x, grad_w
