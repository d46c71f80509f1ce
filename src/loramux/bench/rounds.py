"""Interleaved rounds: every subject once per round, in a random order, so that drift meets all of them alike.

Why CPU time: a process that others push off the core still counts only its own work. Why no garbage collection while
the clock runs: it strikes one subject at random and costs as much as a step.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Measure = Callable[[], float]
"""Runs one measurement and returns its seconds of CPU time."""


@contextmanager
def quiet() -> Iterator[None]:
    """No collection inside but by hand, and then only of what was made inside."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of the whole process, all threads, for one call."""
    start = time.process_time_ns()
    work()
    return (time.process_time_ns() - start) / 1e9


def interleave(
    subjects: Mapping[str, Measure],
    rounds: int,
    *,
    seed: int = 0,
    warmup: int = 1,
    done: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every subject in every round, by name; `done` is called after each measurement."""
    order = list(subjects)
    rng = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    with quiet():
        for number in range(warmup + rounds):
            rng.shuffle(order)
            for name in order:
                spent = subjects[name]()
                if number >= warmup:
                    seconds[name].append(spent)
                done()
            gc.collect()  # cheap: what was there before is frozen
    return seconds
