"""The CPU kernel: base linear and LoRA of few rows in one call of plain C (see lora.c), inference only.

Why: at 1..16 rows a decode step is bound by reading the weights once and by the number of calls. Where there is no
compiler, the same functions run in torch and give the same numbers within rounding.

Letters: N rows of x, D rows of y, M FFN rows, I input width, O output width.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops import reference
from loramux.ops.contract import Pairs, RowMap, Spans
from loramux.ops.cpu_structs import (
    TYPES,
    SiteState,
    SiteStruct,
    fill_lora,
    pairs_address,
    rows_address,
)
from loramux.ops.library import Kernel, load_function

__all__ = [
    "SiteState",
    "apply",
    "available",
    "kernel",
    "linear",
    "linear_torch",
    "prepare",
    "why_not",
]

FEW_ROWS = 16  # vector instructions: the work grows with every row
MANY_ROWS = 64  # AMX: up to 32 rows cost one pass over the weight
ERRORS = {
    1: "out of memory",
    2: "a source row lies outside x",
    3: "a destination row lies outside y",
    4: "a slot is not in spans",
    5: "a token of the row map lies outside x",
    6: "rank_weight has fewer columns than a slot has ranks",
    7: "the pairs or the row map are for another number of rows than x has",
}


@cache
def kernel() -> Kernel:
    """Compiled and loaded on first use, see library.py."""
    takes = [*[ctypes.c_void_p] * 6, ctypes.c_int64, ctypes.c_int]
    return load_function("lora", "loramux_linear", takes, ctypes.c_int)


def available() -> bool:
    return kernel().call is not None


def why_not() -> str:
    """Empty where the kernel runs."""
    return kernel().why_not


def max_rows() -> int:
    """Up to how many rows `linear` is quicker than torch: measured, see MANY_ROWS and FEW_ROWS."""
    return MANY_ROWS if kernel().variant == "amx" else FEW_ROWS


def prepare(
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    spans: Spans | None = None,
) -> SiteState:
    """A filled state; `linear` also fills an empty `SiteState()` on first use."""
    state = SiteState()
    state.fill(weight, bias, a, b, spans)
    return state


def apply(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans, pairs: Pairs) -> Tensor:
    """The contract. Writes into y where y is contiguous."""
    call = kernel().call
    if call is None:
        return reference.apply(y, x, a, b, spans, pairs)
    _refuse_grad(x, a, b, pairs.weight)
    if (
        y.dtype is not x.dtype
        or y.shape != (pairs.num_dst, b.shape[1])
        or x.shape != (pairs.num_src, a.shape[1])
    ):
        raise ValueError(
            f"y {y.dtype} {tuple(y.shape)} and x {x.dtype} {tuple(x.shape)} do not fit "
            f"{pairs.num_dst} x {b.shape[1]} and {pairs.num_src} x {a.shape[1]} of one dtype"
        )
    y, x = y.contiguous(), x.contiguous()
    struct = SiteStruct(d_in=a.shape[1], d_out=b.shape[1], type=TYPES[x.dtype])
    fill_lora(struct, a, b, spans)
    error = call(
        ctypes.addressof(struct),
        pairs_address(pairs),
        None,
        None,
        x.data_ptr(),
        y.data_ptr(),
        pairs.num_src,
        torch.get_num_threads(),
    )
    if error:
        raise ValueError(f"cpu kernel: {ERRORS[error]}")
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    spans: Spans | None = None,
    pairs: Pairs | None = None,
    *,
    enter: RowMap | None = None,
    exit: RowMap | None = None,
    state: SiteState | None = None,
) -> Tensor:
    """W x + bias + LoRA, rounded once to x.dtype. x is [..., I].

    enter: base rows are copied to FFN rows, y is [M, O], pairs go from tokens to rows.
    exit: rows of x are folded to tokens before the base, y is [N, O], pairs go from rows to tokens.
    `state` saves the checks of the next call; hand in the same one for the same site.
    """
    call = kernel().call
    if call is None:
        return linear_torch(x, weight, bias, a, b, spans, pairs, enter=enter, exit=exit)
    if torch.is_grad_enabled():
        _refuse_grad(x, weight, a, b, None if pairs is None else pairs.weight)
    if state is None:
        state = SiteState()
    if state.is_stale(weight, bias, a, b, spans):
        state.fill(weight, bias, a, b, spans)
    d_in = state.d_in
    if x.dtype is not state.dtype or x.shape[-1] != d_in:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, the weight {weight.dtype} {tuple(weight.shape)}"
        )
    if not x.is_contiguous():
        x = x.contiguous()
    if enter is not None:
        y = torch.empty(enter.num_rows, state.d_out, dtype=x.dtype)
    elif exit is not None:
        y = torch.empty(exit.num_tokens, state.d_out, dtype=x.dtype)
    else:
        y = torch.empty(*x.shape[:-1], state.d_out, dtype=x.dtype)
    error = call(
        state.address,
        None if pairs is None or a is None else pairs_address(pairs),
        None if enter is None else rows_address(enter),
        None if exit is None else rows_address(exit),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // d_in,
        torch.get_num_threads(),
    )
    if error:
        raise ValueError(f"cpu kernel: {ERRORS[error]}")
    return y


def linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    spans: Spans | None = None,
    pairs: Pairs | None = None,
    *,
    enter: RowMap | None = None,
    exit: RowMap | None = None,
) -> Tensor:
    """`linear` in torch, for machines without a compiler; differentiable."""
    y = functional.linear(x if exit is None else reference.fold_rows(x, exit), weight, bias)
    if enter is not None:
        y = reference.to_rows(y, enter)
    if a is None or b is None or spans is None or pairs is None:
        return y
    y_DO = y.view(-1, y.shape[-1])
    return reference.apply(y_DO, x.reshape(-1, x.shape[-1]), a, b, spans, pairs).view(y.shape)


def _refuse_grad(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "the cpu kernel has no gradient; use torch.no_grad(), or the reference backend"
        )
