"""The forward pass of training: logits only where there is a label, and the loss in fp32.

Why not `model(labels=...)`: with a short answer behind a long prompt nearly all rows of the logits are thrown away, and
the vocabulary is a fifth of a small model's arithmetic. A hook lets the output head see the supervised positions only,
so whatever the model does to its logits (scaling, soft caps) still happens.

Letters: B rows, T tokens per row, D width, S supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.batch import IGNORED_LABEL
from loramux.ops.cross_entropy import token_losses
from loramux.train.offload import Offload

# What a collated batch may hold and a model call takes.
_CALL_KEYS = ("input_ids", "attention_mask", "position_ids", "prompt_mask", "segment_ids")


class SupervisedForward:
    """Calls a causal language model and returns the summed cross-entropy of its supervised tokens."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.offload: Offload | None = None  # where what backward needs waits, if not on the device
        self._where: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Calls inside compute logits at supervised positions only; other calls of the model are untouched."""
        head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None:
            yield
            return
        hook = head.register_forward_pre_hook(self._select)
        try:
            yield
        finally:
            hook.remove()

    def __call__(self, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """(sum over supervised tokens, how many they are), from what `data.collate` makes."""
        logits_SV, target_S = self.predictions(batch)
        return sum_losses(logits_SV, target_S), target_S.shape[0]

    def predictions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(logits [S, V] where there is a label, the labels [S]), row by row."""
        device = next(self.model.parameters()).device
        target_BT = batch["labels"][:, 1:]
        where = (target_BT != IGNORED_LABEL).nonzero(as_tuple=True)
        target_S = target_BT[where].to(device)
        rows, columns = where[0].to(device), where[1].to(device)
        return self.logits(forward_inputs(batch, device), (rows, columns)), target_S

    def logits(self, inputs: Mapping[str, Any], where: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [S, V] at the positions `where` (rows, columns) of a model call."""
        self._where = where
        saving: AbstractContextManager[Any] = (
            nullcontext() if self.offload is None else self.offload.saving()
        )
        try:
            with saving:
                logits: Tensor = self.model(**inputs, use_cache=False).logits
            if self._where is not None:  # a model whose head the hook did not reach
                logits = logits[where]
        finally:
            self._where = None
        return logits.reshape(where[0].shape[0], -1)

    def _select(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._where is None:
            return None
        (rows, columns), self._where = self._where, None
        hidden_BTD: Tensor = args[0]
        return (hidden_BTD[rows, columns].unsqueeze(0), *args[1:])


def sum_losses(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """Cross-entropy in fp32 (fp64 stays), summed."""
    return token_losses(logits_SV, target_S).sum()


def forward_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What a model call takes of a collated batch, on the model's device."""
    call: dict[str, Any] = {key: batch[key].to(device) for key in _CALL_KEYS if key in batch}
    if "tasks" in batch:
        call["tasks"] = batch["tasks"]
    if "segment_ids" in call:
        # Without a mask transformers derives it from positions that start again, for every attention kernel and with
        # sliding windows, which a ready-made block mask would override. `check_packing` refuses models that do not.
        call.pop("attention_mask", None)
    return call


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens that are not padding."""
    if "segment_ids" in batch:
        return int((batch["segment_ids"] >= 0).sum())
    return int(batch["attention_mask"].sum())
