"""Who takes part in a round: the seam for schedulers, and the plain one.

A round is one optimizer step of every job that was picked. What a scheduler may look at is in `Candidate`; everything
in there comes back with a resumed run, so a scheduler that is a function of it picks the same jobs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Candidate:
    """A job that could take its next step.

    tokens: of its largest micro-batch there, padding included. arrival: its place among all jobs of the run.
    last_round: when it was picked last, 0 if never.
    """

    name: str
    priority: int
    arrival: int
    tokens: int
    last_round: int


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
        if self.max_tokens is None:
            return [job.name for job in order]
        picked: list[str] = []
        room = self.max_tokens
        for job in order:
            if job.tokens <= room or not picked:
                picked.append(job.name)
                room -= job.tokens
        return picked
