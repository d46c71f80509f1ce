"""Cross-entropy of every token over a large vocabulary, a few rows at a time.

    loss_s = log sum_v exp(z_sv) - z_s,target        dz_sv = dloss_s (exp(z_sv - log sum exp z_s) - [v = target])

Why written out: torch's own wants the logits in fp32, keeps the log-probabilities of all of them in fp32, and makes
their gradient in fp32 before it is rounded to the logits' dtype: three times [S, V] in fp32, 200 KB a token each with a
vocabulary of 49,152. Here a few rows are widened at a time, which stay in the cache; only the logits themselves and one
number per token are kept, and the gradient is written in the logits' dtype.

Letters: S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMEL = 1 << 18  # 1 MB in fp32: stays in the second cache of a core
CHUNK_NUMEL_GPU = 1 << 26  # there a launch costs more than the memory


def token_losses(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """The cross-entropy [S] of every row, in fp32 (fp64 stays)."""
    return cast(Tensor, _TokenLosses.apply(logits_SV, target_S))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, target_S: Tensor) -> Tensor:
        wide = torch.promote_types(logits_SV.dtype, torch.float32)
        norm_S = logits_SV.new_empty(logits_SV.shape[0], dtype=wide)
        loss_S = torch.empty_like(norm_S)
        for rows in _chunks(logits_SV):
            wide_CV = logits_SV[rows].to(wide)
            norm_S[rows] = torch.logsumexp(wide_CV, dim=1)
            own_C = wide_CV.gather(1, target_S[rows].unsqueeze(1)).squeeze(1)
            loss_S[rows] = norm_S[rows] - own_C
        ctx.save_for_backward(logits_SV, target_S, norm_S)
        return loss_S

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None]:
        logits_SV, target_S, norm_S = ctx.saved_tensors
        grad_SV = torch.empty_like(logits_SV)
        for rows in _chunks(logits_SV):
            scale_C1 = grad_S[rows].unsqueeze(1)
            grad_CV = logits_SV[rows].to(norm_S.dtype, copy=True)
            grad_CV.sub_(norm_S[rows].unsqueeze(1)).exp_().mul_(scale_C1)
            grad_CV.scatter_add_(1, target_S[rows].unsqueeze(1), -scale_C1)
            grad_SV[rows] = grad_CV
        return grad_SV, None


def _chunks(logits_SV: Tensor) -> Iterator[slice]:
    """Rows that are widened at a time. What one row gives does not depend on which others are beside it."""
    numel = CHUNK_NUMEL if logits_SV.device.type == "cpu" else CHUNK_NUMEL_GPU
    step = max(1, numel // max(1, logits_SV.shape[1]))
    for start in range(0, logits_SV.shape[0], step):
        yield slice(start, start + step)
