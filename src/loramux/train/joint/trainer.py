"""Training several jobs at once: the loop of `Trainer`, with one base forward and backward for the jobs of a round.

In a round every picked job takes one optimizer step. Its micro-batches are laid beside those of the others in as few
model calls as `max_tokens` allows (`calls.py`); everything before and after is the solo trainer's. A job whose own
data, memory or code fails stops alone.

Jobs may be added, paused and cancelled between rounds (`orders.py`); states are in `states.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from loramux.errors import RecipeError
from loramux.recipe.sizes import parse_bytes
from loramux.train.checkpoint import CheckpointStore
from loramux.train.events import Listener
from loramux.train.job import Job
from loramux.train.joint.calls import MAX_TOKENS, Calls, vocabulary
from loramux.train.joint.commands import Inbox, Journal, NoInbox
from loramux.train.joint.entry import Entry
from loramux.train.joint.faults import OwnFault
from loramux.train.joint.forward import JointForward
from loramux.train.joint.guard import MemoryGuard
from loramux.train.joint.orders import Orders
from loramux.train.joint.relief import Relief
from loramux.train.joint.schedule import Candidate, RoundRobin, Scheduler
from loramux.train.joint.trace import TRACE, TraceFile
from loramux.train.joint.trial import why_not_joint
from loramux.train.joint.work import StepWork
from loramux.train.packing import check_packing
from loramux.train.parallel.group import Group
from loramux.train.parallel.inbox import TeamInbox
from loramux.train.parallel.shard import EvenCalls
from loramux.train.runner import JobRunner
from loramux.train.trainer import JobResult, Trainer

if TYPE_CHECKING:
    from loramux.api import Handle

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
JOURNAL = "journal.jsonl"
Load = Callable[[Any], Job]  # puts the adapter of a job's recipe on the handle


class JointTrainer(Trainer):
    """Trains adapters that are on the handle, all in one run. Every job gets a folder of its name in `out`.

    scheduler: who takes part in a round. max_tokens: of one model call. inbox: where commands come from while it runs;
    load: makes a `Job` of what an "add" carries, its adapter on the handle. memory: a limit above the loaded base, such
    as "6GiB"; "measured" predicts without one. With `out` an adapter is taken off the handle when its job has ended and
    it is written; without, all stay.
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
        memory: int | str | None = None,
        group: Group | None = None,
    ):
        self.scheduler: Scheduler = RoundRobin() if scheduler is None else scheduler
        self.inbox: Inbox = NoInbox() if inbox is None else inbox
        self.load = load
        self.entries: dict[str, Entry] = {}
        self.since = self.steps_since = (
            time.monotonic()
        )  # this run; the steps of the round that goes on
        super().__init__(model, handle, jobs, out=None, listeners=listeners, group=group)
        if self.team is not None:
            self.inbox = TeamInbox(self.inbox, self.team)
        obstacle = why_not_joint(model, handle)
        if obstacle:
            log.warning("jobs are trained by turns: %s", obstacle)
        joint = JointForward(model, handle, self.forward)
        self.calls = Calls(joint, max_tokens, obstacle)
        if group is not None and group.shards_base:
            self.calls.joint = self.calls.even = EvenCalls(joint, group)
        self.guard: MemoryGuard | None = None
        if memory is not None:
            if self.team is not None:
                raise RecipeError(
                    "joint.memory: processes would size their calls differently; leave it out, or use one process"
                )
            self.guard = MemoryGuard(parse_bytes(memory), self.calls, vocabulary(model))
        self.calls.guard = self.guard
        self.relief = Relief(lambda: list(self.entries.values()))
        if self.team is None:  # every process would have to move the same job in the same call
            self.calls.make_room = self.relief.make_room
        for runner in self.runners:
            self._enter(runner)
        self.out = out
        self._frees = out is not None
        self.journal = Journal(None if out is None else out / JOURNAL)
        self.replayed = self.journal.last
        self.orders = Orders(self)
        if out is not None:
            from loramux.train.joint import states

            self.store = CheckpointStore(out / "checkpoints")
            states.restore(self, self.store, resume)
        self._leave_writing()
        about = {"max_tokens": max_tokens, "device": self.calls.joint.device.type}
        self.trace = TraceFile(None if self.out is None else self.out / TRACE, self.round, about)
        for runner in self.runners:
            self.trace.job(self.round, runner)

    # --- The jobs ---------------------------------------------------------------------------------

    def _enter(self, runner: JobRunner) -> Entry:
        job = runner.job
        identity = {"method": runner.adapter.method.identity(), **job.identity()}
        entry = Entry(job.name, len(self.entries), job.priority, identity, runner)
        entry.joined = self.round
        self.entries[job.name] = entry
        return entry

    def prepare(self, job: Job) -> JobRunner:
        """The runner of a job whose adapter is on the handle; raises what is wrong with it and changes nothing."""
        if job.name in self.entries:
            raise ValueError(f"a job named {job.name!r} is in this run; choose another name")
        if job.packing:
            check_packing(self.model, self.handle, job.train)
        return self._runner(job)

    def admit(self, runner: JobRunner) -> Entry:
        """Take in a job."""
        self.runners.append(runner)
        return self._enter(runner)

    def join(self, runner: JobRunner) -> None:
        """Take in a job while the run goes on, and tell who listens."""
        self.admit(runner)
        self.trace.job(self.round, runner)
        self._tell("joined", runner)

    def cancel(self, entry: Entry) -> None:
        """End a job as asked; its adapter is written."""
        assert entry.runner is not None
        entry.runner.state.status = "cancelled"
        entry.runner.state.reason = f"as asked, after step {entry.runner.state.step}"
        self._end(entry.runner)
        self.leave(entry)

    def leave(self, entry: Entry) -> None:
        """Free what an ended job holds, once its adapter is written."""
        assert entry.runner is not None
        entry.result = self._result(entry.runner)
        self.relief.release()
        if not self._frees:
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

    def figures(self) -> dict[str, Any]:
        """Of all jobs together: the share of padding, and how well memory was predicted."""
        padding = self.calls.padding
        found: dict[str, Any] = {"padding": None if padding is None else round(padding, 4)}
        return found if self.guard is None else found | {"memory": self.guard.report()}

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
        self.orders.obey()
        while not (ready := self._ready()):
            if self.is_stopping or not self._is_open() or self.round <= self.replayed:
                return
            time.sleep(POLL_SECONDS)
            self.orders.obey()
        self.steps_since = time.monotonic()
        start, cpu = time.perf_counter(), time.process_time()
        works = []
        for name in self._picked(ready):
            entry = self.entries[name]
            entry.last_round = self.round
            works.append((entry, self._begin(entry)))
        self._run([work for _, work in works if work is not None])
        for entry, work in works:
            self._finish(entry, work)
        self.relief.works = {}
        spent = [time.perf_counter() - start, time.process_time() - cpu]
        self.trace.round(self.round, [entry.name for entry, _ in works], self.calls.timed, spent)

    def _picked(self, ready: list[Candidate]) -> list[str]:
        names = self.scheduler.pick(self.round, ready)
        return names if self.team is None else self.team.group.of_first(names)

    def _run(self, works: list[StepWork]) -> None:
        self.relief.works = {work.runner.job.name: work for work in works}
        if self.team is None:
            self.calls.run(works, self.round)
            return
        shares = self.team.divide(
            [(work.runner, [list(part) for part in work.examples]) for work in works]
        )
        for work, share in zip(works, shares, strict=True):
            work.examples, work.mine = share.examples, share.mine
        self.calls.run(works)
        for work, share in zip(works, shares, strict=True):
            share.sums, share.tokens, share.seconds = work.sums, work.tokens, work.seconds
        self.team.merge(self.round, shares)
        for work, share in zip(works, shares, strict=True):
            work.sums, work.tokens, work.seconds = share.sums, share.tokens, share.seconds

    def _leave_writing(self) -> None:
        super()._leave_writing()
        if self.team is not None and not self.team.group.is_first:
            self.journal.path = None

    def _ready(self) -> list[Candidate]:
        entries = [entry for entry in self.entries.values() if entry.is_ready]
        if not entries:
            self.relief.release()
            entries = [entry for entry in self.entries.values() if entry.is_ready]
        return [entry.candidate() for entry in self._admitted(entries)]

    def _admitted(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Those for whom there is memory; who can never have enough is stopped before its first step."""
        if self.guard is None:
            return entries
        fitting = []
        for entry in entries:
            runner, problem = entry.runner, ""
            assert runner is not None
            with OwnFault(runner, "measuring the memory of"):
                problem = self.guard.look_at(entry)
            if problem:
                runner.fail(
                    problem, "Lower micro_batch_size or data.sequence_len, or raise the limit"
                )
            if runner.is_running:
                fitting.append(entry)
            else:
                self._follow_up(runner, None)
                self.leave(entry)
        return self.guard.admitted(fitting)

    def _begin(self, entry: Entry) -> StepWork | None:
        runner = entry.runner
        assert runner is not None
        with OwnFault(runner, "preparing"):
            self.relief.bring_back(entry)
            return StepWork(runner, runner.begin_step(), vocabulary(self.model))
        return None

    def _finish(self, entry: Entry, work: StepWork | None) -> None:
        """The job's own optimizer step, and what is due after it."""
        runner, event = entry.runner, None
        assert runner is not None
        if work is not None and work.is_dropped:
            return
        if work is not None and work.is_alive:
            self.handle.use(entry.name)
            self.handle.dispatch.last = work.last
            with OwnFault(runner, "the optimizer step of"):
                event = runner.finish_step(work.sums, work.tokens, work.seconds)
        self._follow_up(runner, event)
        if not runner.is_running:
            self.leave(entry)

    def _validate(self, runner: JobRunner) -> None:
        with OwnFault(runner, "the validation after"):
            super()._validate(runner)

    # --- States -----------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        from loramux.train.joint import states

        assert self.store is not None
        states.save(self, self.store)
        self._saved_at = time.monotonic()
