"""The state of an adapter's routers, to a file and back: parameters, and buffers such as a balance bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loramux.core.adapter import Adapter
from loramux.formats.errors import FormatError


def router_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Name -> tensor; a parameter that routers share is there once, buffers that are not persistent are left out."""
    routers = adapter.routers_by_key
    kept = routers.state_dict().keys()
    buffers = {name: b for name, b in routers.named_buffers() if name in kept}
    state: dict[str, Tensor] = {**dict(routers.named_parameters()), **buffers}
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def check_routers(adapter: Adapter, saved: Mapping[str, Tensor]) -> None:
    """Refuse saved tensors of other names, shapes and kinds of numbers than the adapter's routers have."""
    own = router_tensors(adapter)
    if own.keys() != saved.keys():
        raise FormatError(
            f"router.safetensors lacks {sorted(own.keys() - saved.keys())[:3]} and has unexpected "
            f"{sorted(saved.keys() - own.keys())[:3]}; it belongs to another mixture or another base"
        )
    for key, tensor in own.items():
        given = saved[key]
        if tensor.shape != given.shape or tensor.is_floating_point() != given.is_floating_point():
            raise FormatError(
                f"router tensor {key} is {given.dtype} {tuple(given.shape)}, expected {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )


@torch.no_grad()
def load_routers(adapter: Adapter, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors into fresh routers, once they are known to fit."""
    check_routers(adapter, saved)
    parameters = dict(adapter.routers_by_key.named_parameters())
    buffers = dict(adapter.routers_by_key.named_buffers())
    for key, given in saved.items():
        if key in parameters:
            parameters[key].data = given.clone()  # in the file's dtype, which training widens
        else:
            buffers[key].copy_(given)
