"""The training loop: a list of jobs over one shared base, one is ordinary fine-tuning.

Jobs take turns, one optimizer step each per round. Every job has its own adapter, data, optimizer, schedule, random
generators and stop rule, so it trains the same whatever its neighbours do; one that diverges leaves the others running.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from loramux.ops.heap import keeping
from loramux.train.checkpoint import CheckpointError, CheckpointStore, refuse_other
from loramux.train.events import Listener, StepEvent
from loramux.train.job import Job, Status
from loramux.train.loss import SupervisedForward
from loramux.train.offload import Offload
from loramux.train.packing import check_packing
from loramux.train.parallel.group import Group
from loramux.train.parallel.team import Team
from loramux.train.runner import JobRunner

if TYPE_CHECKING:
    from loramux.api import Handle

log = logging.getLogger(__name__)
SAVE_SECONDS = 60.0  # between resumable states, for jobs without save_every
LAST_ROWS = 10  # history rows that train_loss is the mean of


@dataclass(frozen=True)
class JobResult:
    """How a job ended. train_loss: mean of the last ten history rows; val_loss: that of the weights that were kept."""

    name: str
    status: Status
    reason: str
    steps: int
    num_steps: int
    train_loss: float | None
    val_loss: float | None
    best_step: int | None
    tokens: int
    seconds: float
    tokens_per_second: float
    adapter: str | None


class Trainer:
    """Trains adapters that are on the handle; `job.name` says which.

    out: folder for `adapter/`, `best/`, `history.json`, `edits.json` (methods that edit ranks) and resumable states;
    None writes nothing. Several jobs each get a folder of their name in it. resume: go on from the last state in
    `out`, if there is one.
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
        group: Group | None = None,
    ):
        names = [job.name for job in jobs]
        if not jobs or len(set(names)) != len(names):
            raise ValueError(
                f"jobs need different names and there must be at least one, got {names}"
            )
        missing = [name for name in names if name not in handle.adapters]
        if missing:
            raise ValueError(
                f"no adapters named {missing} on the handle; add them with handle.add(config, name=...) first"
            )
        packed = next((job for job in jobs if job.packing), None)
        if packed is not None:
            check_packing(model, handle, packed.train)
        self.model = model
        self.handle = handle
        self.out = out
        self.listeners = tuple(listeners)
        self.forward = SupervisedForward(model)
        self.team = None if group is None else Team(group)
        self.runners = [self._runner(job) for job in jobs]
        self.round = 0
        self._stop = False
        self._saved_at = time.monotonic()
        self.store = None if out is None else CheckpointStore(out / "checkpoints")
        self._identity: dict[str, Any] | None = None
        if self.store is not None:
            self._restore(self.store, resume)
            self._leave_writing()

    def _runner(self, job: Job) -> JobRunner:
        runner = JobRunner(job, self.model, self.handle, self.forward)
        if self.team is not None:
            self.team.take_in(runner)
        return runner

    def _leave_writing(self) -> None:
        """To the first process; the others have read what there was."""
        if self.team is not None and not self.team.group.is_first:
            self.out = self.store = None

    # --- The loop -------------------------------------------------------------------------------

    def run(self) -> list[JobResult]:
        """Train until every job has ended or `stop` was called; then say how each stands."""
        results: list[JobResult] = []
        self._saved_at = time.monotonic()
        with self.training_mode():
            self._tell("started")
            if self.team is not None:
                self.team.begin(self)
            try:
                while not self.is_stopping and self._is_open():
                    self.round += 1
                    self.take_round()
                    self._tell("rounded")
                    self._checkpoint_if_due()
            finally:
                results = self.results()
                self._tell("finished", results)
        return results

    def results(self) -> list[JobResult]:
        """How each job stands."""
        return [self._result(runner) for runner in self.runners]

    def figures(self) -> dict[str, Any]:
        """What the results say of all jobs together, beside their sums."""
        return {}

    def _is_open(self) -> bool:
        """Whether there is, or may come, anything to train."""
        return any(runner.is_running for runner in self.runners)

    def listening(self) -> AbstractContextManager[object]:
        """Open, while the run goes on, whatever else may speak to it; here nothing."""
        return nullcontext()

    def stop(self) -> None:
        """End after the current round; a resumable state is written first."""
        if self.team is None:
            self._stop = True
        else:
            self.team.wants_stop = True  # until all processes know

    @property
    def is_stopping(self) -> bool:
        """Whether this round is the last."""
        return self._stop or (self.team is not None and self.team.is_stopping)

    def take_round(self) -> None:
        """One step of every job that is running."""
        for runner in self.runners:
            if runner.is_running:
                team = self.team
                event = runner.step() if team is None else team.step(self.round, runner)
                self._follow_up(runner, event)

    def _follow_up(self, runner: JobRunner, event: StepEvent | None) -> None:
        """What is due after a step; None: it failed."""
        job, state = runner.job, runner.state
        edits = runner.take_edits()
        if event is not None:
            self._tell("stepped", event)
        if edits:
            self._tell("edited", job.name, edits)
        if event is None:
            log.warning("job %s stopped: %s", job.name, state.reason)
            self._end(runner)
            return
        is_last = state.step == runner.num_steps
        every = job.training.eval_every
        hopeless = "" if is_last else runner.why_hopeless(event.loss)
        if job.validation and (is_last or (every and state.step % every == 0)):
            self._validate(runner)
        patience = job.training.early_stopping_patience
        if not runner.is_running:
            pass  # it failed at its validation
        elif hopeless:
            state.status, state.reason = "stopped_early", hopeless
        elif patience and state.num_bad >= patience and not is_last:
            state.status = "stopped_early"
            state.reason = f"no better validation loss since step {state.best_step}"
        elif is_last:
            state.status = "finished"
        if not runner.is_running:
            self._end(runner)

    def _validate(self, runner: JobRunner) -> None:
        loss, is_best = runner.validate()
        if is_best and self.out is not None:
            self.handle.save(self.folder(runner.job) / "best", name=runner.job.name)
        self._tell("validated", runner.job.name, runner.state.step, loss, is_best)

    def _end(self, runner: JobRunner) -> None:
        """Keep the best weights and write the adapter."""
        runner.use_best()
        if self.team is not None:
            self.team.same_weights([runner])
        undone = runner.take_edits()
        if undone:
            self._tell("edited", runner.job.name, undone)
        if self.out is not None and runner.is_finite():
            self.handle.save(self.folder(runner.job) / "adapter", name=runner.job.name)
        elif self.out is not None:
            runner.state.reason += "; no adapter is written, for these weights are not finite"
        if self.out is not None:
            self._write_history(runner)
        self._tell("stopped", runner.job.name, runner.state.status, runner.state.reason)

    # --- What lies in `out` -----------------------------------------------------------------------

    def folder(self, job: Job) -> Path:
        """Where the results of a job are written."""
        assert self.out is not None
        return self.out if self.out_is_one else self.out / job.name

    @property
    def out_is_one(self) -> bool:
        """Whether `out` is the folder of the only job."""
        return len(self.runners) == 1

    def _checkpoint_if_due(self) -> None:
        if self.store is None:
            return
        over = self.is_stopping or not self._is_open()
        if over or self._is_due():
            self.checkpoint()

    def _is_due(self) -> bool:
        periods = [runner.job.training.save_every for runner in self.runners]
        if any(every and self.round % every == 0 for every in periods):
            return True
        return not any(periods) and time.monotonic() - self._saved_at > SAVE_SECONDS

    def checkpoint(self) -> None:
        """Write a state of all jobs that a run can go on from."""
        assert self.store is not None
        tensors = {
            f"{i}.{group}": content
            for i, runner in enumerate(self.runners)
            for group, content in runner.tensors().items()
        }
        meta = {
            "round": self.round,
            "identity": self.identity(),
            "jobs": [runner.saved_state() for runner in self.runners],
        }
        self.store.save(self.round, meta, tensors)
        for runner in self.runners:
            self._write_history(runner)
        self._saved_at = time.monotonic()

    def identity(self) -> dict[str, Any]:
        """What must be equal for a state to be gone on from."""
        from loramux.persist import digest_of_base

        if self._identity is None:
            self._identity = {
                "base": digest_of_base(self.model),
                "jobs": {
                    runner.job.name: {
                        "method": runner.adapter.method.identity(),
                        **runner.job.identity(),
                    }
                    for runner in self.runners
                },
            }
        return self._identity

    def _restore(self, store: CheckpointStore, resume: bool) -> None:
        if not resume:
            if store.numbers():
                raise CheckpointError(
                    f"{store.folder} holds states of an earlier run; resume it or choose another folder"
                )
            return
        saved = store.newest()
        if saved is None:
            return
        refuse_other(saved.meta["identity"], self.identity(), store.folder.parent)
        self.round = int(saved.meta["round"])
        for i, (runner, state) in enumerate(zip(self.runners, saved.meta["jobs"], strict=True)):
            prefix = f"{i}."
            groups = {
                name.removeprefix(prefix): group
                for name, group in saved.tensors.items()
                if name.startswith(prefix)
            }
            runner.restore(state, groups)
        log.info("going on after round %d", self.round)

    def _write_history(self, runner: JobRunner) -> None:
        from loramux.formats.jsonio import write_json

        folder = self.folder(runner.job)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "history.json", [_finite(row) for row in runner.state.history])
        if runner.state.edits:
            write_json(folder / "edits.json", runner.state.edits)

    def _result(self, runner: JobRunner) -> JobResult:
        state, job = runner.state, runner.job
        losses = [row["loss"] for row in state.history if "loss" in row][-LAST_ROWS:]
        folder = None if self.out is None else self.folder(job) / "adapter"
        saved = folder is not None and folder.is_dir() and not runner.is_running
        return JobResult(
            name=job.name,
            status=state.status,
            reason=state.reason,
            steps=state.step,
            num_steps=runner.num_steps,
            train_loss=sum(losses) / len(losses) if losses else None,
            val_loss=state.best_loss,
            best_step=state.best_step if state.best_loss is not None else None,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            adapter=str(folder) if saved else None,
        )

    # --- Around the loop --------------------------------------------------------------------------

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Training mode, logits only at labels, activation checkpointing if asked for; all undone at the end."""
        before, active = self.model.training, self.handle.dispatch.active
        with ExitStack() as stack:
            stack.enter_context(keeping())
            stack.enter_context(self.forward.hooked())
            # An adapter may be taken off when its job has ended.
            stack.callback(
                lambda: self.handle.use(active if active in self.handle.adapters else None)
            )
            stack.callback(self.model.train, before)
            if any(runner.job.training.gradient_checkpointing for runner in self.runners):
                model: Any = self.model
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
                stack.callback(model.gradient_checkpointing_disable)
            if any(runner.job.training.offload_activations for runner in self.runners):
                self.forward.offload = Offload(self.model)
                stack.callback(setattr, self.forward, "offload", None)
            self.model.train()
            yield

    def _tell(self, what: str, *details: Any) -> None:
        for listener in self.listeners:
            getattr(listener, what)(self, *details)


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: value if abs(value) < float("inf") else None for key, value in row.items()}
