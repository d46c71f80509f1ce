"""What a joint run spends beside training: scheduling, collating, logging, history, states and adapters on disk.

A whole run with an output folder, all its logs (TensorBoard, timeline, lines of progress) and a state at the end.
Training is the forward and backward pass of calls and the optimizer step of jobs; whatever else the run does, between
its first round and its last file, is overhead.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import loramux
from loramux.bench.adapters import RANK
from loramux.bench.joint import Load, make_jobs
from loramux.bench.progress import Begin
from loramux.bench.shape import Effort, build_base
from loramux.bench.stats import median_interval, verdict
from loramux.bench.table import TARGETS, Row

T = TypeVar("T")


class Clock:
    """CPU time of what is called through it; calls inside calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_running = False

    def over(self, work: Callable[..., T]) -> Callable[..., T]:
        def timed(*args: Any, **kwargs: Any) -> T:
            if self._is_running:
                return work(*args, **kwargs)
            self._is_running, start = True, time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                self._is_running = False
                self.seconds += time.process_time() - start

        return timed


class TimedCalls:
    """A trainer's calls of the model, timed; everything else of the object as it is."""

    def __init__(self, calls: Any, clock: Clock):
        self._calls = calls
        self._together, self.alone = clock.over(calls), clock.over(calls.alone)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._together(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)


def overhead_rows(load: Load, effort: Effort, folder: str | None, begin: Begin) -> list[Row]:
    """The share of one run's CPU time that is not training."""
    advance = begin("overhead of a joint run", effort.joint_runs)
    shares, spent = [], []
    base = build_base(effort.shape, folder)
    for _ in range(effort.joint_runs):
        with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
            training, whole = measure(base, load, effort.joint_steps, Path(scratch) / "run")
        shares.append((whole - training) / whole)
        spent.append(whole)
        advance()
    found, target = median_interval(shares), TARGETS["joint overhead"]
    extra = {
        "ms": round(1e3 * found.value * median_interval(spent).value, 1),
        "reference_ms": round(1e3 * median_interval(spent).value, 1),
        "rounds": len(shares),
    }
    return [
        Row(
            "overhead", f"{load.title}: scheduling, logging, states, {effort.joint_steps} steps",
            "the whole run", load.jobs * load.rows, load.jobs, found, target,
            verdict(found, target), True, extra,
        )
    ]  # fmt: skip


def measure(base: Any, load: Load, steps: int, out: Path) -> tuple[float, float]:
    """CPU seconds of (training, the whole run)."""
    from loramux.train.board import TensorBoard
    from loramux.train.joint import JointTrainer
    from loramux.train.joint.timeline import Timeline
    from loramux.train.progress import PlainProgress

    config = loramux.LoraConfig(r=RANK, lora_alpha=2 * RANK)
    jobs = [
        replace(job, training=job.training.model_copy(update={"steps": steps}))
        for job in make_jobs(load, base.config.vocab_size)
    ]
    handle = loramux.attach(base, config, name=jobs[0].name)
    for job in jobs[1:]:
        handle.add(config, name=job.name)
    clock = Clock()
    logs = (PlainProgress(io.StringIO()), TensorBoard(out / "tensorboard"), Timeline(out))
    trainer = JointTrainer(base, handle, jobs, out=out, listeners=logs)
    trainer.calls.joint = TimedCalls(trainer.calls.joint, clock)  # type: ignore[assignment]
    for runner in trainer.runners:
        vars(runner)["finish_step"] = clock.over(runner.finish_step)
    start = time.process_time()
    trainer.run()
    whole = time.process_time() - start
    handle.detach()
    return clock.seconds, whole
