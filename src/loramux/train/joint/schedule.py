"""Who takes part in a round: the seam for schedulers, the plain one, and those of the m-LoRA papers.

A round is one optimizer step of every job that was picked. What a scheduler may look at is in `Candidate`; everything
in there comes back with a resumed run, so a scheduler that is a function of it picks the same jobs again. The clock is
not in there for that reason.

Papers: Ye et al., arXiv 2312.02515, v1 (`MinPad`, `Adaptive`) and v2 (`ByPriority`); `Fifo` is what their code does.
`budget.py` holds ours, `schedulers.py` the names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Candidate:
    """A job that could take its next step.

    tokens: of its largest micro-batch there, padding included; rows, length: the shape of that micro-batch.
    arrival: its place among all jobs of the run. last_round: when it was picked last, 0 if never; joined: the round in
    which it came. steps_left: with this one; served: tokens of its steps so far, without padding.
    """

    name: str
    priority: int
    arrival: int
    tokens: int
    last_round: int
    rows: int = 1
    length: int = 0
    steps_left: int = 1
    served: int = 0
    joined: int = 0

    @property
    def tokens_left(self) -> int:
        """About as many as it will need: its steps are taken to be like the next one."""
        return self.tokens * self.steps_left


class Scheduler(Protocol):
    """Chooses jobs for a round. Must pick at least one."""

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        """Names of those that take their next step in round `number`, the most important first."""
        ...


@dataclass(frozen=True)
class RoundRobin:
    """Higher priority first; among equals the one that has waited longest, then the one that came first.

    max_tokens: rounds are filled up to so many tokens; None takes every job in every round. A job never waits for one
    of lower priority; one of lower priority gets what is left over.
    """

    max_tokens: int | None = None

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        order = sorted(ready, key=lambda job: (-job.priority, job.last_round, job.arrival))
        return [job.name for job in filled(order, self.max_tokens)]


def filled(order: Sequence[Candidate], max_tokens: int | None) -> list[Candidate]:
    """From the first on, those that still fit; the first always does. None: everyone."""
    if max_tokens is None:
        return list(order)
    picked: list[Candidate] = []
    room = max_tokens
    for job in order:
        if job.tokens <= room or not picked:
            picked.append(job)
            room -= job.tokens
    return picked


@dataclass(frozen=True)
class Fifo:
    """The jobs that came first, so many at a time, until they end."""

    concurrency: int = 2

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        return [job.name for job in sorted(ready, key=lambda job: job.arrival)[: self.concurrency]]


@dataclass(frozen=True)
class ByPriority:
    """So many at a time, higher priority first, then first come, first served; a new one displaces after the round."""

    concurrency: int = 2

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        return [job.name for job in queue_order(ready)[: self.concurrency]]


@dataclass(frozen=True)
class MinPad:
    """The `concurrency` jobs whose next batches need the least padding when they are padded to one length."""

    concurrency: int = 2

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        return [job.name for job in queue_order(least_padded(ready, self.concurrency))]


@dataclass(frozen=True)
class Adaptive:
    """`MinPad` among the first `q` of the queue, whose head always takes part. q = 0: priority alone; 1: padding."""

    concurrency: int = 2
    q: float = 0.5

    def pick(self, number: int, ready: Sequence[Candidate]) -> list[str]:
        queue = queue_order(ready)
        pool = queue[: max(self.concurrency, math.ceil(self.q * len(queue)))]
        window = least_padded(pool, self.concurrency, queue[0])
        return [job.name for job in queue_order(window)]


def queue_order(ready: Sequence[Candidate]) -> list[Candidate]:
    """Higher priority first, then first come, first served."""
    return sorted(ready, key=lambda job: (-job.priority, job.arrival))


def padding_of(jobs: Sequence[Candidate]) -> int:
    """Tokens that are added when these batches are padded to the longest of them."""
    longest = max(job.length for job in jobs)
    return sum((longest - job.length) * job.rows for job in jobs)


def least_padded(
    jobs: Sequence[Candidate], size: int, head: Candidate | None = None
) -> list[Candidate]:
    """The window over the jobs by length that needs the least padding; with `head`, among those that hold it.

    Ties: the highest sum of priorities, then the oldest. With equal numbers of rows no other choice needs less.
    """
    order = sorted(jobs, key=lambda job: (-job.length, -job.priority, job.arrival))
    size = min(size, len(order))
    windows = [order[first : first + size] for first in range(len(order) - size + 1)]
    if head is not None:
        windows = [window for window in windows if head in window]
    return min(windows, key=_cost)


def _cost(window: Sequence[Candidate]) -> tuple[int, int, int]:
    return (
        padding_of(window),
        -sum(job.priority for job in window),
        min(job.arrival for job in window),
    )
