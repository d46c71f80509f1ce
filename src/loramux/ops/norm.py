"""RMS norm: the definition in torch, in the three forms that models use, and one call of C (norm.c), inference only.

Letters: N rows, D width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from loramux.ops.cpu_structs import TYPES
from loramux.ops.library import Kernel, load_function

# When x / rms is rounded to the dtype of x: before the weight is applied (Llama), after it, or after weight + 1
# (Gemma).
Rule = Literal["round_first", "round_last", "shifted"]
RULES: tuple[Rule, ...] = get_args(Rule)


def rms_norm_torch(x: Tensor, weight_D: Tensor, eps: float, rule: Rule) -> Tensor:
    """x is [..., D]; the mean is taken in fp32."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rule == "round_first":
        return weight_D * scaled.to(x.dtype)
    gain_D = weight_D.float() + 1 if rule == "shifted" else weight_D.float()
    return (scaled * gain_D).to(x.dtype)


class NormStruct(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("rule", ctypes.c_int32),
    ]


@cache
def kernel() -> Kernel:
    return load_function(
        "norm", "loramux_norm", [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
    )


def bind_norm(weight_D: Tensor, eps: float, rule: Rule) -> Callable[[Tensor], Tensor | None] | None:
    """The norm by this weight; None where there is no kernel for it.

    The function returned gives None, having done nothing, for an x that the kernel does not take (another dtype, width
    or device, or one that wants a gradient), and once the weight was moved.
    """
    call = kernel().call
    dtype, width, at = weight_D.dtype, weight_D.shape[0], weight_D.data_ptr()
    if call is None or dtype not in TYPES or weight_D.device.type != "cpu":
        return None
    if weight_D.dim() != 1 or not weight_D.is_contiguous():
        return None
    struct = NormStruct(at, width, eps, TYPES[dtype], RULES.index(rule))
    address, num_threads = ctypes.addressof(struct), torch.get_num_threads
    has_grad, empty_like = torch.is_grad_enabled, torch.empty_like
    keep = (struct, weight_D)  # the kernel has their addresses only

    def run(x: Tensor) -> Tensor | None:
        if (
            x.dtype is not dtype
            or x.shape[-1] != width
            or not x.is_cpu
            or keep[1].data_ptr() != at
            or has_grad()
        ):
            return None
        if not x.is_contiguous():
            x = x.contiguous()
        y = empty_like(x)
        call(address, x.data_ptr(), y.data_ptr(), x.numel() // width, num_threads())
        return y

    return run
