"""The head of an attached model gets its input in one piece.

Why: the last positions of a batch are a slice of the hidden states, and for a slice torch makes a batched product of a
frozen head, with a copy of the whole head per row. That takes longer than all layers of a small model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def hook_head(model: nn.Module) -> list[Any]:
    """Hooks on the output embeddings, to be removed at the end; none where the model has none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [head.register_forward_pre_hook(_in_one_piece)] if isinstance(head, nn.Module) else []


def _in_one_piece(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if args and torch.is_tensor(args[0]) and not args[0].is_contiguous():
        return (args[0].contiguous(), *args[1:])
    return None
