"""How much memory a job's model call takes at its highest, predicted from its shape.

Mem(B, L, S) = b0 + b1 B L + b2 B L^2 + b3 S with no coefficient below zero, fitted per job to measured calls (mLoRA v2,
arXiv 2312.02515, without the last term: supervised positions are ours, because logits exist at those only and a large
vocabulary makes them the largest tensors of a short call). What lives between calls (weights, gradients, moments) is
known to the byte and is not fitted.

What is measured: on a GPU the allocator's high-water mark. On a CPU there is none, and the resident size of a process
says little about one call: `HighWater` counts the bytes of all tensors that live at once, which repeats exactly.

Letters: B rows, L padded length, S supervised positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loramux.train.joint.leastsq import nonnegative_fit

FIRST_MARGIN, FEW_POINTS = 0.05, 8  # paper's recipe as the specification restates it
LEAST_MARGIN = 0.01
KEPT = 256  # measurements of a job


@dataclass(frozen=True)
class CallShape:
    """One job's micro-batch: rows, padded length, supervised positions."""

    rows: int
    length: int
    supervised: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def features(self) -> tuple[float, ...]:
        """In the order in which columns are preferred where few measurements leave a choice."""
        squares = float(self.tokens * self.length)
        return float(self.tokens), 1.0, float(self.supervised), squares


@dataclass
class Measured:
    """bytes: the most that lived at once above what was there before."""

    bytes: int = 0


class HighWater(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {key for key, _ in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result):
            # A view of what was there before costs nothing.
            if key not in self._live and key not in given:
                self._live[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def _storages(value: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            yield storage._cdata, storage


@contextmanager
def measured(device: torch.device) -> Iterator[Measured]:
    """What is done inside, in bytes."""
    found = Measured()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with HighWater() as counted:
        yield found
    found.bytes = counted.peak


@dataclass
class MemoryModel:
    """Coefficients by job, refitted with every measurement.

    points: by job, [features, bytes]. errors: of predictions that were made before they were measured, relative.
    """

    points: dict[str, list[tuple[list[float], float]]] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    _fits: dict[str, list[float]] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        return name in self.points

    def predict(self, name: str, shape: CallShape) -> float:
        """Bytes, without the margin; the job must have been measured."""
        fit = self._fits.get(name)
        if fit is None:
            rows, sizes = zip(*self.points[name], strict=True)
            fit = self._fits[name] = nonnegative_fit(rows, sizes)
        return sum(c * value for c, value in zip(fit, shape.features(), strict=True))

    def learn(self, name: str, shape: CallShape, size: float) -> None:
        """A measured call of this job alone."""
        points = self.points.setdefault(name, [])
        points.append((list(shape.features()), float(size)))
        del points[:-KEPT]
        self._fits.pop(name, None)

    def check(self, shapes: Mapping[str, CallShape], size: float) -> float:
        """A measured call of several jobs: notes the error, then learns, each job its predicted share of the bytes."""
        parts = {name: self.predict(name, shape) for name, shape in shapes.items()}
        total = sum(parts.values())
        error = (total - size) / size if size else 0.0
        self.errors.append(error)
        del self.errors[:-KEPT]
        for name, shape in shapes.items():
            self.learn(name, shape, size * parts[name] / total if total else 0.0)
        return error

    @property
    def mean_error(self) -> float | None:
        """Mean absolute relative error of the predictions so far; None before there was one."""
        return sum(map(abs, self.errors)) / len(self.errors) if self.errors else None

    @property
    def margin(self) -> float:
        """What is added to a prediction: 5 % at first, later twice the error, at least 1 %."""
        if len(self.errors) < FEW_POINTS:
            return FIRST_MARGIN
        return max(2 * (self.mean_error or 0.0), LEAST_MARGIN)

    def state(self) -> dict[str, Any]:
        return {"points": self.points, "errors": self.errors}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> MemoryModel:
        points = {
            name: [(list(map(float, row)), float(size)) for row, size in rows]
            for name, rows in state["points"].items()
        }
        return cls(points, [float(error) for error in state["errors"]])


def spread_shapes(shapes: Sequence[CallShape], count: int) -> list[CallShape]:
    """Some that differ most: the largest, the smallest, the longest, then what lies between."""
    order = sorted(set(shapes), key=lambda s: (s.tokens, s.length, s.supervised))
    if not order:
        return []
    longest = max(order, key=lambda s: (s.length, s.tokens))
    chosen = dict.fromkeys([order[-1], order[0], longest, order[len(order) // 2]])
    return list(chosen)[:count]
