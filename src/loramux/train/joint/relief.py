"""When a job runs out of memory alone: the least important other job moves off the device, and the call is tried again.

What moves are weights, buffers, gradients and moments; they come back when the job is picked again, which is after
another job has ended. Nothing is computed in between, so a job that was moved ends with the bits it would have had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loramux.train.joint.entry import Entry
from loramux.train.joint.work import StepWork
from loramux.train.runner import JobRunner

log = logging.getLogger(__name__)


class Relief:
    """Moves jobs away and back. `entries`: those of the run."""

    def __init__(self, entries: Callable[[], Sequence[Entry]]):
        self.entries = entries
        self.works: dict[str, StepWork] = {}  # steps of the round that goes on, by job

    def make_room(self, work: StepWork) -> bool:
        """Move one job away; False if there is none, or if it is this one that waits: then its step is dropped."""
        own = next(entry for entry in self.entries() if entry.runner is work.runner)
        others = [entry for entry in self.entries() if entry is not own and self._may_go(entry)]
        if not others:
            return False
        victim = min(others, key=lambda entry: (entry.priority, -entry.arrival))
        if victim.priority > own.priority and not work.tokens:
            log.warning("job %s waits until others have ended: out of memory", own.name)
            self._hold(own, work)
            return False
        log.warning("job %s is moved off the device: %s ran out of memory", victim.name, own.name)
        self._hold(victim, self.works.get(victim.name))
        return True

    def _may_go(self, entry: Entry) -> bool:
        """Not one whose gradients of this round are there already: its step would be half."""
        work = self.works.get(entry.name)
        return entry.is_open and not entry.is_held and (work is None or not work.tokens)

    def _hold(self, entry: Entry, work: StepWork | None) -> None:
        assert entry.runner is not None
        if work is not None:
            work.is_dropped = True
        entry.is_held = True
        entry.is_away = True
        move(entry.runner, torch.device("cpu"))

    def bring_back(self, entry: Entry) -> None:
        """Before the job takes a step."""
        assert entry.runner is not None
        if entry.is_away:
            move(entry.runner, entry.runner.device)
            entry.is_away = False

    def release(self) -> None:
        """Held jobs may be picked again."""
        for entry in self.entries():
            entry.is_held = False


def move(runner: JobRunner, device: torch.device) -> None:
    """Weights, buffers, gradients and moments of a job to a device, each as a copy of its own."""
    for tensor in runner.weights().values():
        tensor.data = _copy(tensor.data, device)
        if tensor.grad is not None:
            tensor.grad.data = _copy(tensor.grad.data, device)
    for state in runner.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = _copy(value, device)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True)
