"""A stand-in for a CUDA graph: records which operations a step runs on which tensors, and runs just these again.

Why: replaying a graph runs no Python. A replay that called the step anew would hide a number that Python put in; this
one sees only what lies in the tensors of the first run. While it records it refuses what a capture refuses: reading a
tensor on the host, and making one from Python's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from loramux.ops import paged_triton_kernels, pool_triton_kernels

LAUNCHES = (
    *((pool_triton_kernels, name) for name in ("shrink", "expand")),
    *((paged_triton_kernels, name) for name in ("write", "decode")),
)
HOST_CALLS = {
    torch.tensor, torch.as_tensor, torch.from_numpy,
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__array__,
}  # fmt: skip
HOST_OPS = (
    "item", "_local_scalar_dense", "nonzero", "argwhere", "repeat_interleave", "lift_fresh",
    "masked_select", "unique", "_unique2", "unique_consecutive", "is_nonzero", "equal", "bincount", "pin_memory",
)  # fmt: skip
Run = Callable[[], Any]


class CaptureRefused(RuntimeError):
    """A capture of a graph would have failed here."""


class Tape:
    """A Capture: `tape(work)` runs it once and returns its replay."""

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        runs: list[Run] = []
        with _recorded_launches(runs), _NoHost(), _Recorder(runs):
            out = work()

        def replay() -> Tensor:
            for run in runs:
                run()
            return out

        return replay


class _NoHost(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_CALLS:
            raise CaptureRefused(f"{func} within a captured step")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, runs: list[Run]):
        super().__init__()
        self.runs = runs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in HOST_OPS or _asks_for_places(name, args):
            raise CaptureRefused(f"{name} within a captured step")
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.runs.append(lambda: func(*args, **kwargs))
        elif "empty" not in name:
            self._note_function(func, args, kwargs, out)
        return out

    def _note_function(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Writes results where they were; a view of what went in needs nothing."""
        given = {_storage(t) for t in _tensors((args, kwargs))}
        places = _tensors(out)
        if all(_storage(t) in given for t in places):
            return

        def again() -> None:
            for place, new in zip(places, _tensors(func(*args, **kwargs)), strict=True):
                place.copy_(new)

        self.runs.append(again)


@contextmanager
def _recorded_launches(runs: list[Run]) -> Iterator[None]:
    """Kernels of Triton are one entry each; what its interpreter does inside is not the step's."""

    def recording(launch: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                launch(*args)
            runs.append(lambda: launch(*args))

        return call

    patches = [
        patch.object(module, name, recording(getattr(module, name))) for module, name in LAUNCHES
    ]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def _asks_for_places(name: str, args: Any) -> bool:
    """Whether the size of the result depends on numbers: a mask as an index, `where` without values."""
    if name in ("index", "index_put", "index_put_"):
        return any(t.dtype is torch.bool for t in _tensors(args[1]))
    return name == "where" and len(args) == 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
