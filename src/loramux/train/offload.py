"""Saved activations in the memory of the host: they leave the device after forward and come back for backward.

What backward needs of the weights stays where it is: torch's own `save_on_cpu` would carry the frozen base back and
forth with every call. On a model that is on the CPU itself this copies for nothing; gradients are the same everywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1 << 12  # bytes; not worth the way


class Offload:
    """The activations of one model's calls. Use as `with offload.saving(): model(...)`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._kept: frozenset[int] = frozenset()

    def saving(self) -> AbstractContextManager[Any]:
        """What is saved for backward inside goes to the host."""
        every = [*self.model.parameters(), *self.model.buffers()]
        self._kept = frozenset(tensor.untyped_storage().data_ptr() for tensor in every)
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        is_weight = tensor.untyped_storage().data_ptr() in self._kept
        if is_weight or tensor.nbytes < SMALL:
            return tensor
        is_pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        return tensor.device, host.copy_(tensor, non_blocking=is_pinned)


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=device.type == "cuda")
