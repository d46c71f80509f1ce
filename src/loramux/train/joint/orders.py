"""Obeys what is asked of a running set of jobs, between two rounds, and writes it down first."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loramux.train.joint.commands import Command
from loramux.train.parallel.group import ParallelError

if TYPE_CHECKING:
    from loramux.train.joint.trainer import JointTrainer
    from loramux.train.runner import JobRunner

log = logging.getLogger(__name__)


class Orders:
    """The commands of one run: `obey` is called before every round, by the training thread."""

    def __init__(self, trainer: JointTrainer):
        self.trainer = trainer
        self.journal = trainer.journal

    def obey(self) -> None:
        """What is due in this round: first what an earlier run did here, then, once that is over, what is asked now."""
        run = self.trainer
        if run.round <= run.replayed:
            for command in self.journal.at(run.round):
                self._apply(command)
            return
        for command in run.inbox.poll():
            problem = self._why_not(command)
            runner: JobRunner | None = None
            if not problem and command.what == "add":
                runner, problem = self._prepared(command)
            if not problem:
                self.journal.append(run.round, command)
                self._apply(command, runner)
            run.inbox.answered(command, problem)

    def _prepared(self, command: Command) -> tuple[JobRunner | None, str]:
        """The runner of a job to add, or why there can be none: what is wrong with it must show before the journal
        says that it was taken in, for a run that goes on obeys the journal."""
        run = self.trainer
        assert run.load is not None
        before = set(run.handle.adapters)
        try:
            return run.prepare(run.load(command.value)), ""
        except ParallelError:
            raise
        except Exception as error:
            log.debug("job %s", command.job, exc_info=True)
            for name in set(run.handle.adapters) - before:
                run.handle.remove(name)
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            return None, kind + (" ".join(str(error).split()) or type(error).__name__)

    def _why_not(self, command: Command) -> str:
        entries = self.trainer.entries
        if command.what == "add":
            if self.trainer.load is None:
                return "this run takes no further jobs"
            taken = command.job in entries
            return (
                f"a job named {command.job!r} is in this run; choose another name" if taken else ""
            )
        entry = entries.get(command.job)
        if entry is None:
            return f"no job named {command.job!r}; there are {list(entries)}"
        return "" if entry.is_open else f"the job {command.job!r} has ended"

    def _apply(self, command: Command, runner: JobRunner | None = None) -> None:
        run = self.trainer
        if command.what == "add":
            if runner is None:
                assert run.load is not None
                runner = run.prepare(run.load(command.value))
            run.join(runner)
            return
        entry = run.entries[command.job]
        if command.what == "cancel":
            run.cancel(entry)
        elif command.what == "priority":
            entry.priority = int(command.value)
        else:
            entry.is_paused = command.what == "pause"
