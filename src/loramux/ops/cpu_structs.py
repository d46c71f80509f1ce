"""What lora.c is told: ctypes structs that point into tensors, kept as long as the tensors stay where they are.

Why: a decode step makes some 210 kernel calls, and filling a struct costs more than the call. Parameters are read in
place and never copied, so an optimizer step or a loaded state dict is seen at once; a tensor that was replaced or moved
is noticed by identity and address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.ops.contract import Pairs, RowMap, Spans

TYPES = {torch.float32: 0, torch.bfloat16: 1}


class SiteStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "bias", "a", "b", "start", "rank", "scale")),
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "num_slots", "max_rank")),
        *((name, ctypes.c_int32) for name in ("type", "a_type", "b_type")),
    ]


class PairsStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("src", "dst", "slot", "weight", "rank_weight")),
        *((name, ctypes.c_int64) for name in ("num_pairs", "num_src", "num_dst", "rank_stride")),
    ]


class RowsStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("token", "weight")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_tokens")),
    ]


class SiteState:
    """The kernel's view of one site. Keep one beside the module and hand it to every `linear` call."""

    __slots__ = (
        "a", "a_at", "address", "b", "b_at", "bias", "bias_at", "d_in", "d_out", "dtype", "spans", "struct",
        "weight", "weight_at",
    )  # fmt: skip

    def __init__(self) -> None:
        self.struct = SiteStruct()
        self.address = ctypes.addressof(self.struct)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.spans: Spans | None = None
        self.weight_at = self.bias_at = self.a_at = self.b_at = self.d_in = self.d_out = 0
        self.dtype = torch.float32

    def is_stale(
        self,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        spans: Spans | None,
    ) -> bool:
        return (
            weight is not self.weight
            or weight.data_ptr() != self.weight_at
            or a is not self.a
            or b is not self.b
            or bias is not self.bias
            or spans is not self.spans
            or (a is not None and a.data_ptr() != self.a_at)
            or (b is not None and b.data_ptr() != self.b_at)
            or (bias is not None and bias.data_ptr() != self.bias_at)
            or weight.dtype is not self.dtype
        )

    def fill(
        self,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        spans: Spans | None,
    ) -> None:
        """Checks everything the kernel would otherwise read blindly."""
        if weight.dim() != 2:
            raise ValueError(f"a weight is [out, in], got {tuple(weight.shape)}")
        d_out, d_in = self.d_out, self.d_in = weight.shape
        _check("weight", weight, (d_out, d_in))
        if bias is not None:
            _check("bias", bias, (d_out,), weight.dtype)
        self.bias_at = 0 if bias is None else bias.data_ptr()
        self.struct.w, self.struct.bias = weight.data_ptr(), self.bias_at
        self.struct.d_in, self.struct.d_out = d_in, d_out
        self.struct.type = TYPES[weight.dtype]
        fill_lora(self.struct, a, b, spans)
        self.weight, self.bias, self.a, self.b, self.spans = weight, bias, a, b, spans
        self.weight_at, self.dtype = weight.data_ptr(), weight.dtype
        self.a_at = 0 if a is None else a.data_ptr()
        self.b_at = 0 if b is None else b.data_ptr()


def fill_lora(struct: SiteStruct, a: Tensor | None, b: Tensor | None, spans: Spans | None) -> None:
    if a is None or b is None or spans is None:
        if any(given is not None for given in (a, b, spans)):
            raise ValueError(
                "a, b and spans belong together: give all three, or none for the base alone"
            )
        struct.num_slots = struct.max_rank = 0
        return
    num_rows = a.shape[0]
    _check("a", a, (num_rows, struct.d_in))
    _check("b", b, (num_rows, struct.d_out))
    if spans.num_rows > num_rows:
        raise ValueError(f"spans reach rank row {spans.num_rows}, but a and b have {num_rows}")
    start, rank, scale = spans.table
    struct.a, struct.b = a.data_ptr(), b.data_ptr()
    struct.a_type, struct.b_type = TYPES[a.dtype], TYPES[b.dtype]
    struct.start, struct.rank, struct.scale = start.data_ptr(), rank.data_ptr(), scale.data_ptr()
    struct.num_slots, struct.max_rank = spans.num_slots, spans.max_rank


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    allowed = TYPES if dtype is None else (dtype,)
    given = f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    if tensor.dtype not in allowed or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{given}; the cpu kernel reads contiguous {sorted(map(str, allowed))} on cpu"
        )
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{given}; its shape must be {shape}")


class _Held:
    """A filled struct and the tensors it points into."""

    __slots__ = ("address", "keep", "key", "struct")

    def __init__(self, struct: ctypes.Structure, key: object, keep: Sequence[Tensor]) -> None:
        self.struct, self.key, self.keep = struct, key, keep
        self.address = ctypes.addressof(struct)


def pairs_address(pairs: Pairs) -> int:
    held = pairs.cache.get("cpu")
    if not isinstance(held, _Held) or held.key is not pairs.weight:
        held = pairs.cache["cpu"] = _hold_pairs(pairs)
    return held.address


def _hold_pairs(pairs: Pairs) -> _Held:
    index = [_flat(t, torch.int32) for t in (pairs.src, pairs.dst, pairs.slot)]
    weight = _flat(pairs.weight, torch.float32)
    rank_weight = None if pairs.rank_weight is None else _flat(pairs.rank_weight, torch.float32)
    held = [*index, weight] if rank_weight is None else [*index, weight, rank_weight]
    sizes = {int(t.shape[0]) for t in held}
    if len(sizes) > 1:
        raise ValueError(
            f"src, dst, slot, weight and rank_weight must have one length, got {sorted(sizes)}"
        )
    struct = PairsStruct(
        *(t.data_ptr() for t in index),
        weight.data_ptr(),
        None if rank_weight is None else rank_weight.data_ptr(),
        pairs.num_pairs,
        pairs.num_src,
        pairs.num_dst,
        0 if rank_weight is None else rank_weight.shape[1],
    )
    return _Held(struct, pairs.weight, held)


def rows_address(rows: RowMap) -> int:
    held = rows.cache.get("cpu")
    if not isinstance(held, _Held) or held.key is not rows.weight:
        token, weight = _flat(rows.token, torch.int32), _flat(rows.weight, torch.float32)
        if token.shape[0] != weight.shape[0]:
            raise ValueError(f"{token.shape[0]} rows need as many weights, got {weight.shape[0]}")
        struct = RowsStruct(token.data_ptr(), weight.data_ptr(), rows.num_rows, rows.num_tokens)
        held = rows.cache["cpu"] = _Held(struct, rows.weight, (token, weight))
    return held.address


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
