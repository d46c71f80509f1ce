"""Obeys what is asked of a running set of jobs, between two rounds, and writes it down first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramux.train.job import Job
from loramux.train.joint.commands import Command

if TYPE_CHECKING:
    from loramux.train.joint.trainer import JointTrainer


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
            job: Job | None = None
            if not problem and command.what == "add":
                try:
                    assert run.load is not None
                    job = run.load(command.value)
                except (ValueError, OSError) as error:
                    problem = " ".join(str(error).split())
            if not problem:
                self.journal.append(run.round, command)
                self._apply(command, job)
            run.inbox.answered(command, problem)

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

    def _apply(self, command: Command, job: Job | None = None) -> None:
        run = self.trainer
        if command.what == "add":
            if job is None:
                assert run.load is not None
                job = run.load(command.value)
            run.join(job)
            return
        entry = run.entries[command.job]
        if command.what == "cancel":
            run.cancel(entry)
        elif command.what == "priority":
            entry.priority = int(command.value)
        else:
            entry.is_paused = command.what == "pause"
