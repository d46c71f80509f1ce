"""Compiles every Triton kernel to machine code for two GPUs, with none at hand: Triton brings its own assembler.

Why: the interpreter runs a kernel as Python and so takes what the compiler refuses. Run in a process of its own.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.ops import paged_triton_kernels, pool_triton_kernels, triton_kernels

BLOCKS = {
    "BLOCK_R": 16, "BLOCK_I": 256, "BLOCK_O": 256, "BLOCK_T": 16, "BLOCK_K": 64, "BLOCK_V": 32,
    "BLOCK_C": 32, "KEY_PACK": 2, "VALUE_PACK": 2, "GROUP": 3,
}  # fmt: skip
SWITCHES = ("HAS_RANK_WEIGHT", "HAS_BASE", "HAS_WINDOW", "HAS_SOFTCAP")
FLOATS = ("scale", "softcap")
POINTERS = {
    "slot_at": "*i32", "src_at": "*i32", "order_at": "*i32", "begin_at": "*i32", "row_at": "*i32",
    "blocks_at": "*i32", "rank_at": "*i32", "type_at": "*i32", "weight_at": "*fp32",
    "gate_at": "*fp32", "scale_at": "*fp32", "t_at": "*fp32", "full_at": "*fp32",
    "half_at": "*bf16", "gain_at": "*i64", "length_at": "*i64", "start_at": "*i32",
}  # fmt: skip


def compile_kernel(kernel: Any, dtype: str, on: bool, capability: int, has_arena: bool) -> bytes:
    """Pointers that are named nowhere hold `dtype`. `has_arena`: a_at and b_at are offsets, not rows."""
    constants = {n: BLOCKS.get(n, on) for n in kernel.arg_names if n.isupper()}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_at"):
            is_offset = has_arena and name in ("a_at", "b_at")
            signature[name] = "*i64" if is_offset else POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return made.asm["cubin"]  # type: ignore[no-any-return]


def compile_all() -> int:
    """How many were compiled."""
    done = 0
    for module in (triton_kernels, pool_triton_kernels, paged_triton_kernels):
        has_arena = module is pool_triton_kernels
        for name, kernel in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            for dtype, on, capability in (("bf16", True, 80), ("fp32", False, 90)):
                assert compile_kernel(kernel, dtype, on, capability, has_arena), name
                done += 1
    return done
