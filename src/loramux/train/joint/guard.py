"""Keeps a joint run under a limit of memory: measures each job before it starts, admits it, and sizes calls.

What counts is what the run needs above the loaded base: weights, gradients and moments of the admitted jobs, and the
highest call. A job whose own largest call can never fit is refused before its first step; the others are admitted by
priority, then first come, first served, and wait until there is room.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loramux.train.joint.entry import Entry
from loramux.train.joint.forward import Part
from loramux.train.joint.memory import (
    FEW_POINTS,
    CallShape,
    MemoryModel,
    measured,
    spread_shapes,
)
from loramux.train.joint.work import StepWork
from loramux.train.runner import JobRunner

if TYPE_CHECKING:
    from loramux.core.adapter import Adapter
    from loramux.train.joint.calls import Calls

log = logging.getLogger(__name__)
PROFILED = 4  # measured micro-batches of a job before it starts; three and one for the supervised positions
EVERY = 100  # rounds between measured calls where measuring costs time, after the first ones


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


class MemoryGuard:
    """limit: bytes above the loaded base, None for no limit. vocab: as for `StepWork`."""

    def __init__(self, limit: int | None, calls: Calls, vocab: int | None):
        self.limit = limit
        self.calls = calls
        self.vocab = vocab
        self.model = MemoryModel()
        self.resident = 0  # of the admitted jobs
        self.largest: dict[str, float] = {}  # each job's largest call, predicted
        self.waiting: list[str] = []  # jobs for which there is no room now

    # --- Before a job's first step ------------------------------------------------------------------

    def look_at(self, entry: Entry) -> str:
        """Measure a job that is new; why it can never run under the limit, or ""."""
        runner = entry.runner
        assert runner is not None
        if not self.model.knows(entry.name):
            self._profile(runner)
        if entry.name not in self.largest:
            sizes = [self.model.predict(entry.name, shape) for shape in set(shapes_of(runner))]
            self.largest[entry.name] = max(sizes, default=0.0)
        need = resident_bytes(runner) + self._with_margin(self.largest[entry.name])
        if self.limit is None or need <= self.limit or runner.state.step:
            return ""
        return (
            f"its largest micro-batch needs {gib(need)} above the base, margin of {self.model.margin:.1%} included, "
            f"and joint.memory allows {gib(self.limit)}"
        )

    def _profile(self, runner: JobRunner) -> None:
        """Forward and backward of a few micro-batches; weights, routers and random numbers are as before."""
        chosen: dict[CallShape, int | None] = dict.fromkeys(
            spread_shapes(shapes_of(runner), PROFILED)
        )
        for part in runner.plan:
            shape = shape_of(runner, part)
            if chosen.get(shape, 0) is None:
                examples = [runner.job.train[i] for i in part]
                with untouched(runner):
                    one = StepWork(runner, [examples], self.vocab).part(0)
                    with measured(self.calls.joint.device) as found:
                        # As in a shared call, which takes a little more than one of its own.
                        if self.calls.obstacle:
                            self.calls.joint.alone(one)
                        else:
                            self.calls.joint([one])
                chosen[shape] = found.bytes
                self.model.learn(runner.job.name, shape, found.bytes)
        told = ", ".join(f"{s.rows} x {s.length}: {gib(size or 0)}" for s, size in chosen.items())
        log.info("job %s, memory of its micro-batches: %s", runner.job.name, told)

    # --- In every round -------------------------------------------------------------------------------

    def admitted(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those that may take steps: in order of priority and arrival as long as there is room."""
        self.resident = 0
        chosen: list[Entry] = []
        highest = 0.0
        for entry in sorted(entries, key=lambda e: (-e.priority, e.arrival)):
            assert entry.runner is not None
            own = resident_bytes(entry.runner)
            call = max(highest, self._with_margin(self.largest[entry.name]))
            if self.limit is None or not chosen or self.resident + own + call <= self.limit:
                chosen.append(entry)
                self.resident, highest = self.resident + own, call
        self.waiting = [entry.name for entry in entries if entry not in chosen]
        return chosen

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether these parts may share a call."""
        if self.limit is None:
            return True
        return self.resident + self._with_margin(self.predicted(parts)) <= self.limit

    def predicted(self, parts: Sequence[Part]) -> float:
        return sum(self.model.predict(part.name, part_shape(part)) for part in parts)

    @contextmanager
    def watching(self, number: int, parts: Sequence[Part]) -> Iterator[None]:
        """Measures the call inside where that is due: every one on a GPU, where it costs nothing."""
        device = self.calls.joint.device
        is_due = number % EVERY == 0 or len(self.model.errors) < FEW_POINTS
        if device.type != "cuda" and not is_due:
            yield
            return
        with measured(device) as found:
            yield
        error = self.model.check({part.name: part_shape(part) for part in parts}, found.bytes)
        log.debug(
            "a call of %d jobs: %s, predicted %+.1f %%", len(parts), gib(found.bytes), 100 * error
        )

    def report(self) -> dict[str, Any]:
        """For the results: the limit, each job's largest call, and the error of predictions made beforehand."""
        error = self.model.mean_error
        return {
            "limit": self.limit,
            "largest_call": {name: round(size) for name, size in self.largest.items()},
            "measured_calls": len(self.model.errors),
            "mean_error": None if error is None else round(error, 5),
            "margin": round(self.model.margin, 5),
        }

    def bytes_of(self, name: str) -> int | None:
        """What the job's largest call is predicted to need; None before it was measured."""
        return None if name not in self.largest else round(self.largest[name])

    def _with_margin(self, size: float) -> float:
        return size * (1 + self.model.margin)

    def state(self) -> dict[str, Any]:
        return {**self.model.state(), "largest": self.largest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As it stood: the largest calls too, for what has been learned since would predict others."""
        self.model = MemoryModel.restored(state)
        self.largest = {name: float(size) for name, size in state.get("largest", {}).items()}


def shape_of(runner: JobRunner, part: Sequence[int]) -> CallShape:
    """Of one micro-batch of the plan."""
    examples = [runner.job.train[i] for i in part]
    supervised = sum(example.num_supervised for example in examples)
    lengths = [len(example) for example in examples]
    if runner.job.packing:
        return CallShape(1, sum(lengths), supervised)
    return CallShape(len(part), max(lengths), supervised)


def shapes_of(runner: JobRunner) -> list[CallShape]:
    return [shape_of(runner, part) for part in runner.plan]


def part_shape(part: Part) -> CallShape:
    rows, length = part.batch["input_ids"].shape
    return CallShape(int(rows), int(length), int((part.batch["labels"][:, 1:] >= 0).sum()))


def resident_bytes(runner: JobRunner) -> int:
    """What a job holds between calls: weights and buffers, and a gradient and two moments of each weight it trains."""
    trained = sum(p.numel() * p.element_size() for p in runner.parameters.values())
    return sum(t.numel() * t.element_size() for t in runner.weights().values()) + 3 * trained


@contextmanager
def untouched(runner: JobRunner) -> Iterator[None]:
    """What is run inside leaves the job's random numbers, buffers and routers as they were."""
    rng = dict(runner.rng)
    buffers = {name: t.clone() for name, t in runner.adapter.named_buffers()}
    routers = [(router, _own(router)) for router in _routers(runner.adapter)]
    runner.handle.use(runner.job.name)
    try:
        yield
    finally:
        runner.rng.update(rng)
        for name, tensor in runner.adapter.named_buffers():
            tensor.copy_(buffers[name])
        for router, before in routers:
            vars(router).update(before)


def _routers(adapter: Adapter) -> list[Any]:
    return list(adapter.routers.values())


def _own(router: Any) -> dict[str, Any]:
    """What a router keeps beside its parameters, buffers and modules."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in vars(router).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }
