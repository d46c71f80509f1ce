"""Logits of the supervised positions only, from an unmodified causal language model.

Why a hook, not `model(labels=...)`: with a short answer behind a long prompt nearly all rows of the logits are thrown
away. The output head sees the supervised rows only, so whatever the model does to its logits still happens.

Letters: B rows, T tokens per row, S supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loramux.core.batch import IGNORED_LABEL


@contextmanager
def only_rows(model: nn.Module, where: tuple[Tensor, Tensor]) -> Iterator[None]:
    """The next model call computes logits [1, S, V] at the positions `where` (rows, columns) only."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError("the model has no output head; scores need a causal language model")

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][where].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def token_losses(model: nn.Module, call: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy [S] of every supervised token in fp32 (fp64 stays), row by row. Labels are not shifted."""
    target_BT = labels[:, 1:]
    where = (target_BT != IGNORED_LABEL).nonzero(as_tuple=True)
    with only_rows(model, (where[0], where[1])):
        logits = model(**call, use_cache=False).logits
    target_S = target_BT[where]
    logits_SV = logits.reshape(target_S.shape[0], -1)
    logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
    return functional.cross_entropy(logits_SV, target_S, reduction="none")
