"""Safetensors in and out, with the checks that need the bytes; nothing is ever unpickled.

Why read the file whole: one read serves the parser, one flat scan for NaN, and no later change on disk can reach the
tensors. The safetensors package does the parsing; here is what it does not refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loramux.formats.errors import FormatError, listed
from loramux.formats.files import read_bytes, write_bytes
from loramux.formats.jsonio import parse_json

MAX_WIDTH = 2**24
MAX_HEADER = 100_000_000  # what safetensors itself allows
FLOATS = ("F16", "BF16", "F32", "F64")
STATE = (*FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")

# Letters of the IEEE formats: a number is NaN or infinite where all exponent bits are set.
_EXPONENT: dict[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger[Any]], int]] = {
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0000000000000),
}
_CHUNK = 2**18


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header, checked."""

    dtype: str
    shape: tuple[int, ...]


def read_tensors(path: Path, *, dtypes: tuple[str, ...] = FLOATS) -> dict[str, Tensor]:
    """Every tensor of the file in the file's dtype, finite, none empty; in the order of the header."""
    data = read_bytes(path)
    start, infos = parse_header(data, str(path))
    check_infos(infos, dtypes, str(path))
    try:
        loaded = safetensors.torch.load(data)
    except _PARSER_ERRORS as error:
        raise _corrupt(path, error) from None
    if loaded.keys() != infos.keys():
        raise _corrupt(path, "the parser and the header disagree about the names")
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


def parse_header(data: bytes | memoryview, where: str) -> tuple[int, dict[str, TensorInfo]]:
    """(where the tensor bytes begin, name -> info); the byte ranges are left to safetensors."""
    if len(data) < 8:
        raise _corrupt(where, f"{len(data)} bytes are too few for a header")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER):
        raise _corrupt(
            where, f"the header claims {length:,} bytes, the file has {len(data) - 8:,} after it"
        )
    header = parse_json(bytes(data[8 : 8 + length]), f"header of {where}")
    if not isinstance(header, dict):
        raise _corrupt(where, "the header is not an object")
    header.pop("__metadata__", None)
    return 8 + length, {name: _info(name, entry, where) for name, entry in header.items()}


def check_infos(infos: Mapping[str, TensorInfo], dtypes: tuple[str, ...], where: str) -> None:
    wrong = [name for name, info in infos.items() if info.dtype not in dtypes]
    if wrong:
        found = sorted({infos[name].dtype for name in wrong})
        raise FormatError(
            f"{where}: {listed(wrong)} have dtype {', '.join(found)}; allowed are {', '.join(dtypes)}. "
            "Save the adapter in one of these (quantised adapters: dequantise first)",
            code="dtype",
        )
    empty = [name for name, info in infos.items() if 0 in info.shape]
    if empty:
        raise FormatError(
            f"{where}: {listed(empty)} have a dimension of 0, the mark of sharded parameters that were "
            "not gathered before saving; gather them and save again",
            code="shape",
        )
    wide = [name for name, info in infos.items() if max(info.shape, default=0) > MAX_WIDTH]
    if wide:
        raise FormatError(
            f"{where}: {listed(wide)} are wider than {MAX_WIDTH:,}, which no linear is",
            code="shape",
        )


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
    return _finite_bits(bits, mask)


def _check_finite_file(data: bytes, start: int, tensors: dict[str, Tensor], where: str) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    kinds = _EXPONENT.get(next(iter(dtypes))) if len(dtypes) == 1 else None
    # One dtype and no holes (the parser refuses them): the data section is one flat array.
    if kinds and _finite_bits(np.frombuffer(data, dtype=kinds[1], offset=start), kinds[2]):
        return
    check_finite(tensors, where)


def _finite_bits(bits: np.ndarray[Any, Any], mask: int) -> bool:
    for at in range(0, bits.size, _CHUNK):
        part = bits[at : at + _CHUNK]
        if ((part & mask) == mask).any():
            return False
    return True


def _info(name: str, entry: Any, where: str) -> TensorInfo:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise _corrupt(where, f"the header's entry {name!r} is malformed")
    return TensorInfo(dtype, tuple(shape))


def _corrupt(where: object, why: object) -> FormatError:
    return FormatError(
        f"{where} is not an intact safetensors file: {why}. Download or save it again",
        code="corrupt",
    )


_PARSER_ERRORS = (
    safetensors.SafetensorError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    OverflowError,
)
