"""Loads a C file of this package, compiled for the best instruction set that this process may use.

LORAMUX_NO_CC=1 turns every kernel off, LORAMUX_CPU_VARIANT names an instruction set.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.ops.compiler import BuildError, build, runnable_variants


@dataclass(frozen=True)
class Library:
    """The loaded file, or why there is none. `variant` names the instruction set it was compiled for."""

    code: ctypes.CDLL | None
    variant: str
    why_not: str = ""


def load(name: str) -> Library:
    """`name`.c, beside this file; compiled on first use, see compiler.py."""
    source = Path(__file__).with_name(f"{name}.c")
    if os.environ.get("LORAMUX_NO_CC") == "1":
        return Library(None, "torch", "LORAMUX_NO_CC=1 is set")
    try:
        for variant in runnable_variants(os.environ.get("LORAMUX_CPU_VARIANT")):
            code = ctypes.CDLL(str(build(source, variant.flags)))
            if code.loramux_is_usable():
                return Library(code, variant.name)
    except (BuildError, OSError) as error:
        return Library(None, "torch", str(error))
    return Library(
        None,
        "torch",
        "the system does not let this process use the instructions it was built for",
    )


@dataclass(frozen=True)
class Kernel:
    """The one function of a C file, or why there is none."""

    call: Callable[..., Any] | None
    variant: str
    why_not: str = ""


def load_function(name: str, function: str, takes: Sequence[Any], returns: Any = None) -> Kernel:
    """`function` of `name`.c with its ctypes signature."""
    library = load(name)
    if library.code is None:
        return Kernel(None, library.variant, library.why_not)
    call = getattr(library.code, function)
    call.argtypes, call.restype = list(takes), returns
    return Kernel(call, library.variant)
