"""What pool_gates.h is told: gates and the calls that use them as ctypes structs."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramux.ops.contract import Pairs
from loramux.ops.cpu_structs import TYPES
from loramux.ops.pool_kernel import check, kernel

if TYPE_CHECKING:
    from loramux.ops.gates import LateCall, LateGate, TopKCall


class TopKGateStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "slots")),
        *((name, ctypes.c_int64) for name in ("num_experts", "k")),
        ("normalise", ctypes.c_int32),
    ]


class TopKStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gates", "token", "gate", "pair", "row")),
        *((name, ctypes.c_void_p) for name in ("enter_slot", "exit_slot")),
        *((name, ctypes.c_void_p) for name in ("exit_weight", "row_weight")),
        *((name, ctypes.c_int64) for name in ("num_entries", "width", "num_tokens")),
        ("type", ctypes.c_int32),
    ]


class LateGateStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("be", "mean", "gram", "total", "mask")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_experts")),
        *((name, ctypes.c_float) for name in ("inv_tau", "eps")),
    ]


class LateStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gates", "token", "gate", "pair", "also")),
        *((name, ctypes.c_int64) for name in ("num_entries", "num_also")),
    ]


class BoundTopK:
    """The filled structs of a TopKCall. The call must outlive it: nothing but addresses is kept here."""

    def __init__(self, call: TopKCall, num_tokens: int):
        self.gates = (TopKGateStruct * len(call.gates))()
        for struct, gate, slots in zip(self.gates, call.gates, call.slots, strict=True):
            struct.weight, struct.slots = gate.weight_ED.data_ptr(), slots.data_ptr()
            struct.num_experts, struct.k = gate.num_experts, gate.k
            struct.normalise = gate.normalise
        self.most = max((gate.num_experts for gate in call.gates), default=0)
        arrays = (call.token, call.gate, call.pair, call.row)
        written = (call.enter.slot, call.exit.slot, call.exit.weight, call.rows.weight)
        self.struct = TopKStruct(
            ctypes.addressof(self.gates),
            *(array.data_ptr() for array in (*arrays, *written)),
            num_entries=call.token.shape[0],
            width=call.width,
            num_tokens=num_tokens,
        )
        self.address = ctypes.addressof(self.struct)

    def run(self, x_ND: Tensor) -> None:
        """x_ND: contiguous fp32 or bf16."""
        top_k = kernel().top_k
        assert top_k is not None
        self.struct.type = TYPES[x_ND.dtype]
        check(top_k(self.address, x_ND.data_ptr(), x_ND.numel() // x_ND.shape[-1], self.most))


class _BoundLate:
    def __init__(self, call: LateCall):
        self.gates = (LateGateStruct * len(call.gates))()
        for struct, gate in zip(self.gates, call.gates, strict=True):
            _fill_late(struct, gate)
        for weight in call.also:
            check_written("also", weight, torch.float32)
        self.also = (ctypes.c_void_p * len(call.also))(*(w.data_ptr() for w in call.also))
        self.struct = LateStruct(
            ctypes.addressof(self.gates),
            *(array.data_ptr() for array in (call.token, call.gate, call.pair)),
            also=ctypes.addressof(self.also),
            num_entries=call.token.shape[0],
            num_also=len(call.also),
        )
        self.address = ctypes.addressof(self.struct)


def _fill_late(struct: LateGateStruct, gate: LateGate) -> None:
    struct.be, struct.mean = gate.be_RE.data_ptr(), gate.mean_R.data_ptr()
    struct.gram, struct.total = gate.gram_RR.data_ptr(), gate.total_E.data_ptr()
    struct.mask = None if gate.mask_E is None else gate.mask_E.data_ptr()
    struct.num_rows, struct.num_experts = gate.num_rows, gate.num_experts
    struct.inv_tau, struct.eps = gate.inv_tau, gate.eps


def late_address(call: LateCall, pairs: Pairs | None) -> int:
    """Raises ValueError where the weights could not be written into the pairs."""
    if pairs is None:
        raise ValueError("a late gate reads the first linear of the group: it needs pairs there")
    check_written("pairs.weight", pairs.weight, torch.float32)
    held = call.cache.get("cpu")
    if not isinstance(held, _BoundLate):
        held = call.cache["cpu"] = _BoundLate(call)
    return held.address


def check_written(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Results are written in place, so no converted copy will do."""
    if tensor.dtype is not dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; it is written in place and must be contiguous {dtype} on cpu"
        )
