"""Rotary position embedding of queries and keys in one call of C (rotary.c), inference only.

Letters: N tokens, H query heads, G key heads, D head width, R numbers of a head that are rotated.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from loramux.ops.cpu_structs import TYPES
from loramux.ops.library import Kernel, load_function

_TURN = ctypes.c_int64 * 7


def rotary_torch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin on the first R numbers of every head, the others as they are.

    query [1, H, N, D], key [1, G, N, D], cos and sin [1, N, R].
    """
    turned, cos, sin = cos.shape[-1], cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        part, rest = x[..., :turned], x[..., turned:]
        first, second = part.chunk(2, -1)
        return torch.cat([part * cos + torch.cat([-second, first], -1) * sin, rest], -1)

    return turn(query), turn(key)


@cache
def kernel() -> Kernel:
    return load_function(
        "rotary",
        "loramux_rotary",
        [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_int],
    )


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """As `rotary_torch`, to the bit; None, having done nothing, for what the kernel does not take."""
    call, dtype = kernel().call, query.dtype
    code = TYPES.get(dtype)
    if call is None or code is None or not (key.dtype is cos.dtype is sin.dtype is dtype):
        return None
    if query.dim() != 4 or cos.dim() != 3 or not query.is_cpu or torch.is_grad_enabled():
        return None
    one, heads, num, dim = query.shape
    key_shape, (_, cos_num, turned) = key.shape, cos.shape
    (_, q_head, q_token, q_last), (_, k_head, k_token, k_last) = query.stride(), key.stride()
    if (
        one != 1
        or cos_num != num
        or sin.shape != cos.shape
        or key_shape[::2] != (1, num)
        or key_shape[3] != dim
        or turned % 2
        or turned > dim
        or not (q_last == k_last == 1 and cos.is_contiguous() and sin.is_contiguous())
    ):
        return None
    q_out, k_out = torch.empty_like(query), torch.empty_like(key)
    (_, qo_head, qo_token, _), (_, ko_head, ko_token, _) = q_out.stride(), k_out.stride()
    call(
        _TURN(query.data_ptr(), heads, q_head, q_token, q_out.data_ptr(), qo_head, qo_token),
        _TURN(key.data_ptr(), key_shape[1], k_head, k_token, k_out.data_ptr(), ko_head, ko_token),
        cos.data_ptr(), sin.data_ptr(), num, turned, dim, code, torch.get_num_threads(),
    )  # fmt: skip
    return q_out, k_out
