"""Which backend runs, and why: a table to read and a decision to print.

Nothing here tries something and falls back: a backend that cannot run says why, and asking for it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from loramux.ops.contract import Pairs, Spans

Apply = Callable[[Tensor, Tensor, Tensor, Tensor, Spans, Pairs], Tensor]

BACKENDS = {
    "reference": "loramux.ops.reference:apply",
    "grouped": "loramux.ops.grouped:apply",
    "cpu": "loramux.ops.cpu:apply",
    "triton": "loramux.ops.triton:apply",
}

MAX_TRITON_ROWS = 256  # ours, not measured: the shrink kernel reads A once per pair
MAX_DENSE_RANK = 512  # ours: above it the dense form computes too many ranks that no row uses


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def load_backend(name: str) -> Apply:
    module, function = BACKENDS[name].split(":")
    return cast(Apply, getattr(import_module(module), function))


def choose_backend(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_rows: int,
    needs_grad: bool,
    total_rank: int,
    requested: str = "auto",
) -> Choice:
    """total_rank: rank rows of the site over all its slots."""
    device = torch.device(device)
    if requested != "auto":
        return _requested(requested, device, dtype, needs_grad)
    kernel = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "")
    obstacle = (
        why_not(kernel, device, dtype, needs_grad) if kernel else f"no kernel for {device.type}"
    )
    limit = 0 if obstacle else _max_rows(kernel)
    if not obstacle and num_rows <= limit:
        return Choice(kernel, f"{num_rows} rows of at most {limit}, no gradient wanted")
    reason = obstacle and f"not {kernel}: {obstacle}" if kernel else obstacle
    reason = reason or f"{num_rows} rows are more than the {limit} that {kernel} is made for"
    if total_rank > MAX_DENSE_RANK:
        return Choice(
            "grouped", f"{reason}; {total_rank} ranks are too many to compute for every row"
        )
    return Choice(
        "reference", f"{reason}; {total_rank} ranks are few enough to compute for every row"
    )


def _max_rows(kernel: str) -> int:
    if kernel == "triton":
        return MAX_TRITON_ROWS
    from loramux.ops import cpu

    return cpu.max_rows()


def why_not(name: str, device: torch.device, dtype: torch.dtype, needs_grad: bool) -> str:
    """Empty if backend `name` can run this, else the reason."""
    if name == "cpu":
        return _why_not_cpu(device, dtype, needs_grad)
    if name == "triton":
        return _why_not_triton(device, dtype, needs_grad)
    return ""


def _requested(name: str, device: torch.device, dtype: torch.dtype, needs_grad: bool) -> Choice:
    reasons = {each: why_not(each, device, dtype, needs_grad) for each in BACKENDS}
    if name in reasons and not reasons[name]:
        return Choice(name, "asked for")
    problem = f"cannot run here: {reasons[name]}" if name in reasons else "does not exist"
    others = "; ".join(
        f"{each} ({reason or 'available'})" for each, reason in reasons.items() if each != name
    )
    raise ValueError(f"backend {name!r} {problem}. Choose 'auto' or one of: {others}")


def _why_not_cpu(device: torch.device, dtype: torch.dtype, needs_grad: bool) -> str:
    if device.type != "cpu":
        return f"rows are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {dtype}"
    if needs_grad:
        return "it has no gradient"
    if torch.is_autocast_enabled("cpu"):
        return "autocast decides the dtype of every torch call, and the kernel is none"
    from loramux.ops import cpu

    return cpu.why_not()


def _why_not_triton(device: torch.device, dtype: torch.dtype, needs_grad: bool) -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if needs_grad:
        return "it has no gradient"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    from loramux.ops.triton import is_interpreted

    if device.type != "cuda" and not is_interpreted():
        return f"rows are on {device.type}, and TRITON_INTERPRET=1 is not set"
    return ""
