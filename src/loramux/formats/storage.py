"""Safetensors in and out, with the checks that need the bytes; nothing is ever unpickled.

Why read the file whole: one read serves the parser, one flat scan for NaN, and no later change on disk can reach the
tensors. The safetensors package does the parsing; here is what it does not refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loramux.formats.errors import FormatError, listed
from loramux.formats.files import read_bytes, write_bytes
from loramux.formats.raw import (
    EXPONENT,
    FLOATS,
    check_infos,
    corrupt,
    finite_bits,
    parse_header,
)

_EXPONENT: dict[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger[Any]], int]] = {
    torch.float16: (torch.int16, np.uint16, EXPONENT["float16"]),
    torch.bfloat16: (torch.int16, np.uint16, EXPONENT["bfloat16"]),
    torch.float32: (torch.int32, np.uint32, EXPONENT["float32"]),
    torch.float64: (torch.int64, np.uint64, EXPONENT["float64"]),
}


def read_tensors(path: Path, *, dtypes: tuple[str, ...] = FLOATS) -> dict[str, Tensor]:
    """Every tensor of the file in the file's dtype, finite, none empty; in the order of the header."""
    data = read_bytes(path)
    start, infos = parse_header(data, str(path))
    check_infos(infos, dtypes, str(path))
    try:
        loaded = safetensors.torch.load(data)
    except _PARSER_ERRORS as error:
        raise corrupt(path, error) from None
    if loaded.keys() != infos.keys():
        raise corrupt(path, "the parser and the header disagree about the names")
    tensors = {name: loaded[name] for name in infos}
    _check_finite_file(data, start, tensors, str(path))
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace `path` in one step, in the layout `safetensors.torch.save_file` gives."""
    # Copies: rows of one bank share memory, which safetensors refuses.
    ready = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    check_finite(ready, str(path))
    write_bytes(path, safetensors.torch.save(ready, metadata={"format": "pt"}))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinities, with the names of the tensors that hold them."""
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise FormatError(
            f"{where}: {listed(bad)} hold NaN or infinite values; the training that made them diverged, "
            "use an earlier checkpoint",
            code="nonfinite",
        )


def is_finite(tensor: Tensor) -> bool:
    kinds = _EXPONENT.get(tensor.dtype)
    if kinds is None:
        return True
    as_int, as_unsigned, mask = kinds
    # The same bits seen as integers: several times faster than torch.isfinite on bfloat16.
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(as_int).numpy().view(as_unsigned)
    return finite_bits(bits, mask)


def _check_finite_file(data: bytes, start: int, tensors: dict[str, Tensor], where: str) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    kinds = _EXPONENT.get(next(iter(dtypes))) if len(dtypes) == 1 else None
    # One dtype and no holes (the parser refuses them): the data section is one flat array.
    if kinds and finite_bits(np.frombuffer(data, dtype=kinds[1], offset=start), kinds[2]):
        return
    check_finite(tensors, where)


_PARSER_ERRORS = (
    safetensors.SafetensorError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    OverflowError,
)
