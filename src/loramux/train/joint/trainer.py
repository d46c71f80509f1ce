"""Training several jobs at once: the loop of `Trainer`, with one base forward and backward for the jobs of a round.

In a round every picked job takes one optimizer step. Its micro-batches are laid beside those of the others in as few
model calls as `max_tokens` allows; everything before and after is the solo trainer's. A job whose own data, memory or
code fails stops alone: a call that failed is taken apart, and who fails alone is the one to stop.

Jobs may be added, paused and cancelled between rounds (`commands.py`); states are in `states.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from loramux.train.checkpoint import CheckpointStore
from loramux.train.events import Listener
from loramux.train.job import Job
from loramux.train.joint.commands import Command, Inbox, Journal, NoInbox
from loramux.train.joint.faults import describe, free_memory, is_out_of_memory
from loramux.train.joint.forward import JointForward, Outcome, Part
from loramux.train.joint.schedule import Candidate, RoundRobin, Scheduler
from loramux.train.joint.trial import why_not_joint
from loramux.train.joint.work import StepWork, step_tokens
from loramux.train.packing import check_packing
from loramux.train.runner import JobRunner
from loramux.train.trainer import JobResult, Trainer

if TYPE_CHECKING:
    from loramux.api import Handle

log = logging.getLogger(__name__)
MAX_TOKENS = 4096  # ours: of one model call; beyond it products are no faster and activations grow
POLL_SECONDS = 0.2
JOURNAL = "journal.jsonl"
Load = Callable[[Any], Job]  # puts the adapter of a job's recipe on the handle


@dataclass(eq=False)
class Entry:
    """A job in the run. runner: None once it has ended and its adapter is written; result: then how it ended.

    since, from_step: when and where it began in this process.
    """

    name: str
    arrival: int
    priority: int
    identity: dict[str, Any]
    runner: JobRunner | None
    last_round: int = 0
    is_paused: bool = False
    result: JobResult | None = None
    since: float = field(default_factory=time.monotonic)
    from_step: int = 0

    @property
    def is_open(self) -> bool:
        return self.runner is not None and self.runner.is_running


class JointTrainer(Trainer):
    """Trains adapters that are on the handle, all in one run. Every job gets a folder of its name in `out`.

    scheduler: who takes part in a round. max_tokens: of one model call. inbox: where commands come from while it runs;
    load: makes a `Job` of what an "add" carries, its adapter on the handle. With `out` an adapter is taken off the
    handle when its job has ended and it is written; without, all stay.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: Handle,
        jobs: Sequence[Job],
        *,
        out: Path | None = None,
        resume: bool = False,
        listeners: Sequence[Listener] = (),
        scheduler: Scheduler | None = None,
        max_tokens: int = MAX_TOKENS,
        inbox: Inbox | None = None,
        load: Load | None = None,
    ):
        self.scheduler: Scheduler = RoundRobin() if scheduler is None else scheduler
        self.max_tokens = max_tokens
        self.inbox: Inbox = NoInbox() if inbox is None else inbox
        self.load = load
        self.entries: dict[str, Entry] = {}
        super().__init__(model, handle, jobs, out=None, listeners=listeners)
        self.joint = JointForward(model, handle, self.forward)
        self.obstacle = why_not_joint(model, handle)
        if self.obstacle:
            log.warning("jobs are trained by turns: %s", self.obstacle)
        for runner in self.runners:
            self._enter(runner)
        self.out = out
        self.journal = Journal(None if out is None else out / JOURNAL)
        self.replayed = self.journal.last
        if out is not None:
            from loramux.train.joint import states

            self.store = CheckpointStore(out / "checkpoints")
            states.restore(self, self.store, resume)

    # --- The jobs ---------------------------------------------------------------------------------

    def _enter(self, runner: JobRunner) -> Entry:
        job = runner.job
        identity = {"method": runner.adapter.method.identity(), **job.identity()}
        entry = Entry(job.name, len(self.entries), job.priority, identity, runner)
        self.entries[job.name] = entry
        return entry

    def admit(self, job: Job) -> Entry:
        """Take in a job whose adapter is on the handle."""
        if job.name in self.entries:
            raise ValueError(f"a job named {job.name!r} is in this run; choose another name")
        if job.packing:
            check_packing(self.model, self.handle, job.train)
        runner = JobRunner(job, self.model, self.handle, self.forward)
        self.runners.append(runner)
        return self._enter(runner)

    def leave(self, entry: Entry) -> None:
        """Free what an ended job holds, once its adapter is written."""
        assert entry.runner is not None
        entry.result = self._result(entry.runner)
        if self.out is None:
            return
        self.runners.remove(entry.runner)
        entry.runner = None
        if entry.name in self.handle.adapters:
            if self.handle.dispatch.active == entry.name:
                self.handle.use(None)
            self.handle.remove(entry.name)

    def results(self) -> list[JobResult]:
        """How each job stands, in the order they came."""
        return [
            self._result(entry.runner) if entry.runner is not None else entry.result  # type: ignore[misc]
            for entry in self.entries.values()
        ]

    @property
    def out_is_one(self) -> bool:
        """Never: others may come."""
        return False

    def listening(self) -> AbstractContextManager[object]:
        return self.inbox if isinstance(self.inbox, AbstractContextManager) else nullcontext()

    # --- One round --------------------------------------------------------------------------------

    def _is_open(self) -> bool:
        more = self.inbox.stays_open or self.round < self.replayed
        return more or any(entry.is_open for entry in self.entries.values())

    def take_round(self) -> None:
        self._obey()
        while not (ready := self._ready()):
            if self._stop or not self._is_open() or self.round <= self.replayed:
                return
            time.sleep(POLL_SECONDS)
            self._obey()
        works = []
        for name in self.scheduler.pick(self.round, ready):
            entry = self.entries[name]
            entry.last_round = self.round
            works.append((entry, self._begin(entry)))
        self._run([work for _, work in works if work is not None])
        for entry, work in works:
            self._finish(entry, work)

    def _ready(self) -> list[Candidate]:
        return [
            Candidate(
                entry.name,
                entry.priority,
                entry.arrival,
                step_tokens(entry.runner),
                entry.last_round,
            )
            for entry in self.entries.values()
            if entry.runner is not None and entry.runner.is_running and not entry.is_paused
        ]

    def _begin(self, entry: Entry) -> StepWork | None:
        runner = entry.runner
        assert runner is not None
        with self._own_fault(runner, "preparing"):
            return StepWork(runner, runner.begin_step(), self.vocab)
        return None

    def _run(self, works: Sequence[StepWork]) -> None:
        """Forward and backward of all micro-batches, those of one number together."""
        for number in range(max((len(work.examples) for work in works), default=0)):
            parts: list[tuple[StepWork, Part]] = []
            for work in works:
                if work.is_alive and number < len(work.examples):
                    with self._own_fault(work.runner, "the data of"):
                        parts.append((work, work.part(number)))
            for group in self._groups(parts):
                self._call(group)

    def _groups(
        self, parts: Sequence[tuple[StepWork, Part]]
    ) -> Iterator[list[tuple[StepWork, Part]]]:
        """Parts that share a model call: in order, up to `max_tokens`."""
        group: list[tuple[StepWork, Part]] = []
        tokens = 0
        for work, part in parts:
            if group and (self.obstacle or tokens + part.num_tokens > self.max_tokens):
                yield group
                group, tokens = [], 0
            group.append((work, part))
            tokens += part.num_tokens
        if group:
            yield group

    def _call(self, group: Sequence[tuple[StepWork, Part]]) -> None:
        start = time.perf_counter()
        outcomes = self._together([part for _, part in group]) if len(group) > 1 else None
        if outcomes is None:
            for work, part in group:
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
        with self._own_fault(work.runner, "the forward and backward pass of"):
            outcome = self.joint.alone(part)
            work.take(part.batch, outcome, time.perf_counter() - start)

    def _finish(self, entry: Entry, work: StepWork | None) -> None:
        """The job's own optimizer step, and what is due after it."""
        runner, event = entry.runner, None
        assert runner is not None
        if work is not None and work.is_alive:
            self.handle.use(entry.name)
            self.handle.dispatch.last = work.last
            with self._own_fault(runner, "the optimizer step of"):
                event = runner.finish_step(work.sums, work.tokens, work.seconds)
        self._follow_up(runner, event)
        if not runner.is_running:
            self.leave(entry)

    def _validate(self, runner: JobRunner) -> None:
        with self._own_fault(runner, "the validation after"):
            super()._validate(runner)

    def _own_fault(self, runner: JobRunner, what: str) -> OwnFault:
        return OwnFault(runner, what)

    @property
    def vocab(self) -> int | None:
        """How many token ids the base knows."""
        model: Any = self.model
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        return None if embeddings is None else int(embeddings.weight.shape[0])

    # --- Commands ---------------------------------------------------------------------------------

    def _obey(self) -> None:
        """What is due in this round: first what an earlier run did here, then, once that is over, what is asked now."""
        if self.round <= self.replayed:
            for command in self.journal.at(self.round):
                self._apply(command)
            return
        for command in self.inbox.poll():
            problem = self._why_not(command)
            job: Job | None = None
            if not problem and command.what == "add":
                try:
                    assert self.load is not None
                    job = self.load(command.value)
                except (ValueError, OSError) as error:
                    problem = " ".join(str(error).split())
            if not problem:
                self.journal.append(self.round, command)
                self._apply(command, job)
            self.inbox.answered(command, problem)

    def _why_not(self, command: Command) -> str:
        if command.what == "add":
            if self.load is None:
                return "this run takes no further jobs"
            taken = command.job in self.entries
            return (
                f"a job named {command.job!r} is in this run; choose another name" if taken else ""
            )
        entry = self.entries.get(command.job)
        if entry is None:
            return f"no job named {command.job!r}; there are {list(self.entries)}"
        return "" if entry.is_open else f"the job {command.job!r} has ended"

    def _apply(self, command: Command, job: Job | None = None) -> None:
        if command.what == "add":
            if job is None:
                assert self.load is not None
                job = self.load(command.value)
            entry = self.admit(job)
            assert entry.runner is not None
            self._tell("joined", entry.runner)
            return
        entry = self.entries[command.job]
        assert entry.runner is not None
        if command.what == "cancel":
            entry.runner.state.status = "cancelled"
            entry.runner.state.reason = f"as asked, after step {entry.runner.state.step}"
            self._end(entry.runner)
            self.leave(entry)
        elif command.what == "priority":
            entry.priority = int(command.value)
        else:
            entry.is_paused = command.what == "pause"

    # --- States -----------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        from loramux.train.joint import states

        assert self.store is not None
        states.save(self, self.store)
        self._saved_at = time.monotonic()


class OwnFault:
    """What goes wrong inside stops this one job, with its reason."""

    def __init__(self, runner: JobRunner, what: str):
        self.runner = runner
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        log.debug("job %s", self.runner.job.name, exc_info=error)
        step = self.runner.state.step + 1
        self.runner.fail(*describe(error, f"{self.what} step {step}"))
        free_memory()
        return True
