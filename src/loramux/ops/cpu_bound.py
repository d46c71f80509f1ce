"""`cpu.linear` for calls that repeat: everything looked up once, so that a decode step pays for little but the kernel.

Why: a decode step makes some 210 calls of a few microseconds each; looking up modules, parameters and shapes took as
long as the calls themselves. Whatever may have changed since is still checked, by identity and address.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loramux.ops.contract import Pairs, Spans
from loramux.ops.cpu import ERRORS, kernel, prepare
from loramux.ops.cpu_structs import pairs_address

Parameters = Mapping[str, Tensor | None]
Bound = Callable[[Tensor], Tensor | None]


def bind(
    base: Parameters,
    rows: Parameters | None,
    spans: Spans | None,
    pairs: Pairs | None,
    shape_in: tuple[int, ...],
) -> Bound | None:
    """W x + bias + LoRA for x of this shape, without gradient; None where there is no kernel.

    The function returned gives None, having done nothing, once x has another form or a parameter was replaced or moved:
    call `cpu.linear` then, and bind anew. `base` and `rows` are the `_parameters` of the two modules, since a module's
    own attribute lookup costs more than all checks here.
    """
    call = kernel().call
    weight, bias = base["weight"], base["bias"]
    if call is None or weight is None:
        return None
    a, b = (None, None) if rows is None else (rows["a"], rows["b"])
    state = prepare(weight, bias, a, b, spans)
    dtype, weight_at, bias_at = state.dtype, state.weight_at, state.bias_at
    a_at, b_at = state.a_at, state.b_at
    held = None if pairs is None else pairs_address(pairs)
    pair_weight = None if pairs is None else pairs.weight
    shape_out, num_rows = (*shape_in[:-1], state.d_out), math.prod(shape_in[:-1])
    num_threads = torch.get_num_threads

    def run(x: Tensor) -> Tensor | None:
        if (
            x.shape != shape_in
            or x.dtype is not dtype
            or not x.is_contiguous()
            or base["weight"] is not weight
            or weight.data_ptr() != weight_at
            or base["bias"] is not bias
            or (bias is not None and bias.data_ptr() != bias_at)
        ):
            return None
        if rows is not None and (
            rows["a"] is not a
            or rows["b"] is not b
            or a.data_ptr() != a_at  # type: ignore[union-attr]
            or b.data_ptr() != b_at  # type: ignore[union-attr]
            or pairs.weight is not pair_weight  # type: ignore[union-attr]
        ):
            return None
        y = x.new_empty(*shape_out)
        # `state` owns the struct at this address: naming it here keeps it alive as long as this function.
        error = call(
            state.address, held, None, None, x.data_ptr(), y.data_ptr(), num_rows, num_threads()
        )
        if error:
            raise ValueError(f"cpu kernel: {ERRORS[error]}")
        return y

    return run
