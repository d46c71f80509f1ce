"""A job's place in a joint run: what the run knows of it beside its runner."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from loramux.train.joint.schedule import Candidate
from loramux.train.joint.work import step_shape
from loramux.train.runner import JobRunner
from loramux.train.trainer import JobResult


@dataclass(eq=False)
class Entry:
    """A job in the run. runner: None once it has ended and its adapter is written; result: then how it ended.

    is_held: waits until another job has ended, for want of memory; is_away: its tensors are off the device meanwhile.
    since, from_step: when and where it began in this process. joined: the round in which it came.
    """

    name: str
    arrival: int
    priority: int
    identity: dict[str, Any]
    runner: JobRunner | None
    last_round: int = 0
    joined: int = 0
    is_paused: bool = False
    is_held: bool = False
    is_away: bool = False
    result: JobResult | None = None
    since: float = field(default_factory=time.monotonic)
    from_step: int = 0

    @property
    def is_open(self) -> bool:
        return self.runner is not None and self.runner.is_running

    @property
    def is_ready(self) -> bool:
        """Whether it may take a step in the next round."""
        return self.is_open and not self.is_paused and not self.is_held

    def candidate(self) -> Candidate:
        """What a scheduler may look at."""
        assert self.runner is not None
        runner = self.runner
        rows, length = step_shape(runner)
        return Candidate(
            self.name,
            self.priority,
            self.arrival,
            rows * length,
            self.last_round,
            rows,
            length,
            runner.num_steps - runner.state.step,
            runner.state.tokens,
            self.joined,
        )
