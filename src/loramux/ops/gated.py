"""act(gate) * up of a gated FFN: the definition in torch, and one call of C (gated.c), inference only."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.cpu_structs import TYPES
from loramux.ops.library import Kernel, load_function

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def gated_torch(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


@cache
def kernel() -> Kernel:
    return load_function(
        "gated", "loramux_gate", [*[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int] * 3]
    )


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor | None:
    """As `gated_torch`, each step rounded to the dtype; None, having done nothing, for what the kernel does not
    take."""
    call, dtype = kernel().call, gate.dtype
    code = TYPES.get(dtype)
    if (
        call is None
        or code is None
        or up.dtype is not dtype
        or gate.shape != up.shape
        or not gate.is_cpu
        or torch.is_grad_enabled()
        or not (gate.is_contiguous() and up.is_contiguous())
    ):
        return None
    y = torch.empty_like(gate)
    call(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(),
        code, ACTIVATIONS.index(activation), torch.get_num_threads(),
    )  # fmt: skip
    return y
