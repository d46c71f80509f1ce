"""Safetensors without torch: the header, checked, and tensors as the bits of a mapped file.

Why: a registry that only stores and compares adapters should start in a moment and in little memory, and what is asked
of an upload (names, shapes, finite bits, digest) needs no tensor library. The safetensors package parses the same
header again: two parsers have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors

from loramux.formats.errors import FormatError, listed
from loramux.formats.jsonio import parse_json

MAX_WIDTH = 2**24
MAX_HEADER = 100_000_000  # what safetensors itself allows
FLOATS = ("F16", "BF16", "F32", "F64")
STATE = (*FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")

# safetensors' name -> (torch's name, bytes)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),  # scales of microscaled bases
}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}
# A number of the IEEE formats is NaN or infinite where all exponent bits are set.
EXPONENT = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}
_CHUNK = 2**18

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header, checked; where its bytes lie is not."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor as the bits of its numbers. Answers the few questions that format checks put to a torch tensor."""

    dtype: str  # torch's name
    bits: Bits

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    def dim(self) -> int:
        return self.bits.ndim

    def numel(self) -> int:
        return int(self.bits.size)

    def t(self) -> RawTensor:
        return RawTensor(self.dtype, self.bits.T)

    def __getitem__(self, index: Any) -> Any:
        return self.bits[index] & self._magnitude

    def any(self) -> bool:
        """Whether one number is not zero, of either sign."""
        return any(bool((row & self._magnitude).any()) for row in np.atleast_2d(self.bits))

    def is_finite(self) -> bool:
        mask = EXPONENT.get(self.dtype)
        return mask is None or finite_bits(np.ravel(self.bits, order="K"), mask)

    def floats(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The numbers in fp32; a mapped tensor of that type is not copied."""
        bits = np.ascontiguousarray(self.bits)
        if self.dtype == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if self.dtype not in EXPONENT:
            raise TypeError(f"{self.dtype} is no float")
        return bits.view(np.dtype(self.dtype)).astype(np.float32, copy=False)

    def raw(self) -> Bits:
        """Its bytes, in row order."""
        return np.ascontiguousarray(self.bits).reshape(-1).view(np.uint8)

    @property
    def _magnitude(self) -> Any:
        width = self.bits.dtype.itemsize * 8
        sign = 1 << (width - 1) if self.dtype in EXPONENT else 0
        return self.bits.dtype.type((1 << width) - 1 - sign)


def map_tensors(path: Path) -> dict[str, RawTensor]:
    """Every tensor of a safetensors file, its bytes left on disk until they are read; in the order of the header."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        start, infos = parse_header(data.data, str(path))
        check_ranges(infos, data.size - start, str(path))
        with safetensors.safe_open(path, framework="np") as second:
            agreed = set(second.keys()) == infos.keys()
    except (OSError, ValueError, OverflowError, safetensors.SafetensorError) as error:
        if isinstance(error, FormatError):
            raise
        raise corrupt(path, error) from None
    if not agreed:
        raise corrupt(path, "the parser and the header disagree about the names")
    body = np.asarray(data)[start:]
    return {name: _tensor(body, info) for name, info in infos.items()}


def parse_header(data: bytes | memoryview, where: str) -> tuple[int, dict[str, TensorInfo]]:
    """(where the tensor bytes begin, name -> info); whether the byte ranges fit is for `check_ranges`."""
    if len(data) < 8:
        raise corrupt(where, f"{len(data)} bytes are too few for a header")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER):
        raise corrupt(
            where, f"the header claims {length:,} bytes, the file has {len(data) - 8:,} after it"
        )
    header = parse_json(bytes(data[8 : 8 + length]), f"header of {where}")
    if not isinstance(header, dict):
        raise corrupt(where, "the header is not an object")
    header.pop("__metadata__", None)
    return 8 + length, {name: _info(name, entry, where) for name, entry in header.items()}


def check_ranges(infos: Mapping[str, TensorInfo], num_bytes: int, where: str) -> None:
    """Every tensor has the bytes its shape needs; together they are the whole of the data, each byte once."""
    at = 0
    for name, info in sorted(infos.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        _, width = DTYPES.get(info.dtype, ("", 0))
        if not width:
            raise corrupt(where, f"{name!r:.150} has the unknown dtype {info.dtype!r:.40}")
        if info.start != at or info.end - info.start != prod(info.shape) * width:
            raise corrupt(
                where, f"the byte range of {name!r:.150} does not fit its shape or the others"
            )
        at = info.end
    if at != num_bytes:
        raise corrupt(where, f"the tensors need {at:,} bytes, the file has {num_bytes:,}")


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


def finite_bits(bits: np.ndarray[Any, Any], mask: int) -> bool:
    """Whether none of these numbers, seen as unsigned integers, is NaN or infinite."""
    for at in range(0, bits.size, _CHUNK):
        part = bits[at : at + _CHUNK]
        if ((part & mask) == mask).any():
            return False
    return True


def corrupt(where: object, why: object) -> FormatError:
    return FormatError(
        f"{where} is not an intact safetensors file: {why}. Download or save it again",
        code="corrupt",
    )


def _tensor(body: Bits, info: TensorInfo) -> RawTensor:
    dtype, width = DTYPES[info.dtype]
    part = body[info.start : info.end]
    if part.ctypes.data % width:
        part = part.copy()  # a header of odd length; numpy's views need aligned numbers
    return RawTensor(dtype, part.view(_UNSIGNED[width]).reshape(info.shape))


def _info(name: str, entry: Any, where: str) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _is_sizes(shape)
        or not _is_sizes(span)
        or len(span) != 2
        or span[0] > span[1]
    ):
        raise corrupt(where, f"the header's entry {name!r:.150} is malformed")
    return TensorInfo(dtype, tuple(shape), *span)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
