"""The model calls of a round: whose micro-batches share one, and what is done when one fails.

A call that fails leaves no trace; its parts are then run one by one, and who fails alone is the job to stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from loramux.train.joint.faults import OwnFault, free_memory, is_out_of_memory
from loramux.train.joint.forward import JointForward, Outcome, Part
from loramux.train.joint.guard import MemoryGuard
from loramux.train.joint.trace import TimedCall
from loramux.train.joint.work import StepWork
from loramux.train.loss import num_tokens
from loramux.train.parallel.group import ParallelError

if TYPE_CHECKING:
    from loramux.train.joint.guard import MemoryGuard
    from loramux.train.parallel.shard import EvenCalls

log = logging.getLogger(__name__)
MAX_TOKENS = 4096  # ours: of one model call; beyond it products are no faster and activations grow
Group = list[tuple[StepWork, Part]]


class Calls:
    """Forward and backward of the steps of a round. max_tokens: of one call; obstacle: why no call may be shared."""

    def __init__(self, joint: JointForward, max_tokens: int = MAX_TOKENS, obstacle: str = ""):
        self.joint: JointForward | EvenCalls = joint
        self.max_tokens = max_tokens
        self.obstacle = obstacle
        self.timed: list[TimedCall] = []  # of the round that goes on
        self.seen = [0, 0]  # tokens of the whole run: without padding, with it
        self.guard: MemoryGuard | None = None
        self.make_room: Callable[[StepWork], bool] = lambda _: False
        self.even: EvenCalls | None = None  # over a base in pieces

    def run(self, works: Sequence[StepWork], round_number: int = 0) -> None:
        """All micro-batches of these steps, those of one number together."""
        self.timed = []
        for number in range(max((len(work.examples) for work in works), default=0)):
            parts: Group = []
            for work in works:
                if work.is_alive and work.runs(number):
                    with OwnFault(work.runner, "the data of"):
                        parts.append((work, work.part(number)))
            groups = self.groups(parts)
            for planned in groups if self.even is None else self.even.announced(groups):
                group = [(work, part) for work, part in planned if work.is_alive]
                start, cpu = time.perf_counter(), time.process_time()
                with self._watching(round_number, group):
                    self.call(group)
                spent = (time.perf_counter() - start, time.process_time() - cpu)
                self._count(group)
                self.timed.append(TimedCall(tuple(_shape(part) for _, part in group), *spent))
            if self.even is not None:
                self.even.keep_up(works)

    def _count(self, group: Group) -> None:
        self.seen[0] += sum(num_tokens(part.batch) for _, part in group)
        self.seen[1] += sum(part.num_tokens for _, part in group)

    @property
    def padding(self) -> float | None:
        """Share of the tokens of all calls so far that were padding."""
        return 1 - self.seen[0] / self.seen[1] if self.seen[1] else None

    def _watching(self, number: int, group: Group) -> AbstractContextManager[None]:
        if self.guard is None or not group:
            return nullcontext()
        return self.guard.watching(number, [part for _, part in group])

    def groups(self, parts: Sequence[tuple[StepWork, Part]]) -> Iterator[Group]:
        """Parts that share a model call: in order, up to `max_tokens`, and as memory allows."""
        group: Group = []
        tokens = 0
        for work, part in parts:
            if group and (
                self.obstacle
                or tokens + part.num_tokens > self.max_tokens
                or not self._fits([*group, (work, part)])
            ):
                yield group
                group, tokens = [], 0
            group.append((work, part))
            tokens += part.num_tokens
        if group:
            yield group

    def _fits(self, group: Group) -> bool:
        return self.guard is None or self.guard.fits([part for _, part in group])

    def call(self, group: Group) -> None:
        """One call for these parts; one by one if it fails."""
        start = time.perf_counter()
        outcomes = self._together([part for _, part in group]) if len(group) > 1 else None
        if outcomes is None:
            for work, part in group:
                if work.is_alive:
                    self._alone(work, part)
            return
        seconds = time.perf_counter() - start
        total = sum(part.num_tokens for _, part in group)
        for (work, part), outcome in zip(group, outcomes, strict=True):
            work.take(part.batch, outcome, seconds * part.num_tokens / total)

    def _together(self, parts: Sequence[Part]) -> list[Outcome] | None:
        """None if the call failed; nothing has changed then but what is allowed in one call."""
        before = [dict(part.rng) for part in parts]
        try:
            return self.joint(parts)
        except ParallelError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self.max_tokens = max(1, sum(part.num_tokens for part in parts) // 2)
                told = f"; from now on a call holds at most {self.max_tokens} tokens"
            else:
                told = ""
            log.warning(
                "a call for the jobs %s failed (%s: %s); each is run alone%s",
                *([part.name for part in parts], type(error).__name__, error, told),
            )
            log.debug("the call that failed", exc_info=True)
        for part, rng in zip(parts, before, strict=True):
            part.rng.update(rng)
        free_memory()
        return None

    def _alone(self, work: StepWork, part: Part) -> None:
        start = time.perf_counter()
        with OwnFault(work.runner, "the forward and backward pass of"):
            outcome = self._retried(work, part)
            if outcome is not None:
                work.take(part.batch, outcome, time.perf_counter() - start)

    def _retried(self, work: StepWork, part: Part) -> Outcome | None:
        """As often as there is another job to make room; None if this one is to wait."""
        while True:
            before = dict(part.rng)
            try:
                return self.joint.alone(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                has_room = self.make_room(work)
                if not has_room and work.is_alive:
                    raise
            part.rng.update(before)
            free_memory()
            if not has_room:
                return None


def _shape(part: Part) -> tuple[str, int, int]:
    rows, length = part.batch["input_ids"].shape
    return part.name, int(rows), int(length)


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids the base knows; None if it does not say."""
    some: Any = model
    embeddings = getattr(some, "get_input_embeddings", lambda: None)()
    return None if embeddings is None else int(embeddings.weight.shape[0])
