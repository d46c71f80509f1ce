"""The library compiled from pool.c, and what its error numbers mean."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from loramux.ops.library import load

GAIN_AT_EXIT = 10
ERRORS = {
    1: "out of memory",
    2: "a source row lies outside x",
    3: "a destination row lies outside y",
    4: "a slot lies outside the table",
    5: "a token lies outside x",
    6: "rank_weight has fewer columns than a slot has ranks",
    7: "the pairs or the row map are for another number of rows than x has",
    8: "a pair names a slot that holds no adapter",
    9: "a late gate is for other experts than its pairs name",
    GAIN_AT_EXIT: "a DoRA slot acts where rows leave an FFN",
    11: "a DoRA slot rescales what the base gives; use group_linear, which computes both",
}


@dataclass(frozen=True)
class Kernel:
    """The functions of pool.c, or why there are none."""

    group: Callable[..., int] | None
    add: Callable[..., int] | None
    top_k: Callable[..., int] | None
    variant: str
    why_not: str = ""


@cache
def kernel() -> Kernel:
    library = load("pool")
    if library.code is None:
        return Kernel(None, None, None, library.variant, library.why_not)
    code = library.code
    group, add, top_k = code.loramux_group, code.loramux_add, code.loramux_top_k
    add.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    group.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    top_k.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    group.restype = add.restype = top_k.restype = ctypes.c_int
    return Kernel(group, add, top_k, library.variant)


def check(error: int) -> None:
    if error:
        raise ValueError(f"pool kernel: {ERRORS[error]}")
