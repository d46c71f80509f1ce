"""What paged.c is told: ctypes structs that point into pools and into the plan of a step.

Letters as in paged.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramux.ops.cpu_structs import TYPES
from loramux.ops.library import load

if TYPE_CHECKING:
    from loramux.ops.paged import LayerKV, PagedRows

KERNEL_TOKENS = 16  # the kernel reads keys of so many tokens at once: blocks are multiples of it
ERRORS = {
    1: "out of memory",
    2: "a token's slot lies outside the pool",
    3: "a block lies outside the pool",
    4: "a decode or a piece is no row of the step, or longer than its blocks",
}


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("type", ctypes.c_int32),
    ]


class RowsStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slot", "row", "length", "begin", "blocks")),
        *((f"piece_{name}", ctypes.c_void_p) for name in ("first", "end", "start", "begin")),
        *((f"num_{name}", ctypes.c_int64) for name in ("tokens", "decodes", "pieces", "blocks")),
    ]


@dataclass(frozen=True)
class Kernel:
    """The functions of paged.c, or why there are none."""

    attend: Callable[..., int] | None
    check: Callable[..., int] | None
    takes_pieces: Callable[..., int] | None
    variant: str
    why_not: str = ""


@cache
def kernel() -> Kernel:
    library = load("paged")
    code = library.code
    if code is None:
        return Kernel(None, None, None, library.variant, library.why_not)
    attend, check = code.loramux_paged, code.loramux_paged_check
    takes_pieces = code.loramux_paged_takes_pieces
    view: list[Any] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    attend.argtypes = [*[ctypes.c_void_p] * 2, *view * 3, ctypes.c_void_p, ctypes.c_int]
    check.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    takes_pieces.argtypes = [ctypes.c_void_p]
    attend.restype = check.restype = takes_pieces.restype = ctypes.c_int
    return Kernel(attend, check, takes_pieces, library.variant)


class HeldLayer:
    """A filled struct, its address, and whether the kernel attends to pieces of prompts, too."""

    __slots__ = ("address", "struct", "takes_pieces")

    def __init__(self, struct: LayerStruct):
        self.struct, self.address = struct, ctypes.addressof(struct)
        takes_pieces = kernel().takes_pieces
        assert takes_pieces is not None
        self.takes_pieces = bool(takes_pieces(self.address))


class HeldRows:
    """A filled struct, its address, and the arrays that it points into."""

    __slots__ = ("address", "keep", "struct")

    def __init__(self, struct: RowsStruct, keep: Sequence[Tensor]):
        self.struct, self.address, self.keep = struct, ctypes.addressof(struct), keep


def fits(kv: LayerKV) -> bool:
    """Whether the kernel reads this pool: on the CPU, of a dtype, block size and key width that it knows."""
    keys = kv.keys_BGDTP
    return (
        kernel().attend is not None
        and keys.device.type == "cpu"
        and keys.dtype in TYPES
        and keys.shape[4] * keys.dtype.itemsize == 4
        and kv.values_BGTDP.shape[4] == keys.shape[4]
        and kv.block_size % KERNEL_TOKENS == 0
    )


def hold_layer(kv: LayerKV, num_heads: int) -> HeldLayer:
    keys, values = kv.keys_BGDTP, kv.values_BGTDP
    if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype is values.dtype):
        raise ValueError("keys and values of a pool must be contiguous and of one dtype")
    if num_heads % keys.shape[1]:
        raise ValueError(f"{num_heads} query heads cannot share {keys.shape[1]} key/value heads")
    return HeldLayer(
        LayerStruct(
            keys.data_ptr(), values.data_ptr(), num_heads, keys.shape[1],
            keys.shape[2] * keys.shape[4], values.shape[3], kv.block_size, kv.window or 0,
            kv.scale, kv.softcap or 0.0, TYPES[keys.dtype],
        )
    )  # fmt: skip


def hold_rows(rows: PagedRows, num_blocks: int, block_size: int) -> HeldRows:
    """Checks what the kernel would otherwise read blindly."""
    num, pieces = rows.num_decodes, rows.pieces
    if rows.length_S.shape[0] != num or rows.begin_S.shape[0] != num + 1:
        raise ValueError(f"{num} decodes need as many lengths and one more begin")
    begin = [rows.blocks.shape[0]]
    for piece in pieces:
        begin.append(begin[-1] + piece.blocks.shape[0])
    keep = [rows.slot_N.to(torch.int64)]
    keep += [t.to(torch.int32) for t in (rows.row_S, rows.length_S, rows.begin_S)]
    keep.append(torch.cat([rows.blocks, *(piece.blocks for piece in pieces)]).to(torch.int32))
    ends = ([p.first for p in pieces], [p.end for p in pieces], [p.start for p in pieces], begin)
    keep += [torch.tensor(numbers, dtype=torch.int32) for numbers in ends]
    keep = [tensor.contiguous() for tensor in keep]
    struct = RowsStruct(
        *(t.data_ptr() for t in keep), rows.slot_N.shape[0], num, len(pieces), keep[4].shape[0]
    )
    held, check = HeldRows(struct, keep), kernel().check
    assert check is not None
    error = check(held.address, num_blocks, block_size)
    if error:
        raise ValueError(f"paged kernel: {ERRORS[error]}")
    return held
