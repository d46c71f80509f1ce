"""Jobs that arrive while a run goes on and are made of a trained probe (FanLoRA): the probe goes first, as a job.

Its command carries the job that follows under "then"; when the probe has ended, it is scored between two rounds, the
setting is written into its folder (NAME-probe/setting.json), and the job is added. Both commands are in the journal, so
a run that was killed does the same again in the same rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.recipe import JobRecipe
from loramux.train.joint.commands import Command, Inbox
from loramux.train.probe import SETTING, asking, check_probes, probe_recipe, setting_of

if TYPE_CHECKING:
    from loramux.train.job import Job
    from loramux.train.joint.trainer import JointTrainer

log = logging.getLogger(__name__)
THEN = "then"
SUFFIX = "-probe"
Refuse = Callable[[str, str], None]  # (name of the job, why)


class ProbedJobs:
    """An inbox between `source` and the run. build: the examples of a job; refuse: told of a job that cannot follow."""

    def __init__(
        self,
        source: Inbox,
        trainer: Callable[[], JointTrainer],
        build: Callable[[JobRecipe], Job],
        refuse: Refuse,
    ):
        self.source = source
        self.trainer = trainer
        self.build = build
        self.refuse = refuse
        self._asked: dict[str, Command] = {}  # by the name of the probe: what came for it
        self._given_up: set[str] = set()

    @property
    def stays_open(self) -> bool:
        return self.source.stays_open or bool(self._pending())

    def poll(self) -> Sequence[Command]:
        found = []
        for command in self.source.poll():
            try:
                found.append(self._first(command))
            except (LoramuxError, ValueError, OSError) as error:
                self.source.answered(command, " ".join(str(error).split()))
        return [*found, *self._due()]

    def answered(self, command: Command, problem: str) -> None:
        asked = self._asked.pop(command.job, None)
        if problem and command.job in {then["name"] for then in self._pending().values()}:
            self._give_up(command.job, problem)
        self.source.answered(command if asked is None else asked, problem)

    def _first(self, command: Command) -> Command:
        """The command, or that for the probe it needs."""
        if command.what != "add":
            return command
        job = JobRecipe.model_validate(command.value)
        method = asking(job)
        probe = None if method is None else method.probe()
        if method is None or probe is None:
            return command
        if job.name in self.trainer().entries:
            return command  # refused by its own name, not the probe's
        check_probes([job], [method])
        name = job.name + SUFFIX
        (first,) = probe_recipe([job], probe).jobs_resolved()
        first = first.model_copy(update={"name": name, "priority": job.priority})
        self._asked[name] = command
        return Command("add", name, {**first.model_dump(mode="json"), THEN: command.value})

    def _pending(self) -> dict[str, dict[str, Any]]:
        """Probe -> the job that is to follow it and has not come yet."""
        run = self.trainer()
        found = {}
        for _, command in run.journal.rows:
            then = command.value.get(THEN) if isinstance(command.value, dict) else None
            if then and then["name"] not in run.entries and then["name"] not in self._given_up:
                found[command.job] = then
        return found

    def _due(self) -> list[Command]:
        found = []
        for name, then in self._pending().items():
            entry = self.trainer().entries.get(name)
            if entry is None or entry.result is None:
                continue
            status = entry.result.status
            if status not in ("finished", "stopped_early"):
                self._give_up(then["name"], f"its probe {name} has {status}: {entry.result.reason}")
                continue
            try:
                path = self._setting(name, then)
            except (LoramuxError, ValueError, OSError) as error:
                self._give_up(then["name"], f"its probe {name} cannot be scored: {error}")
                continue
            value = {**then, "method": {**then["method"], "setting": str(path)}}
            found.append(Command("add", then["name"], value))
        return found

    def _setting(self, name: str, then: dict[str, Any]) -> Path:
        """The file that the probe leads to; one that is there already is taken."""
        from loramux.formats.jsonio import write_json

        run = self.trainer()
        assert run.out is not None
        folder = (run.out / name).resolve()
        path = folder / SETTING
        if path.exists():
            return path
        job = JobRecipe.model_validate(then)
        method = asking(job)
        assert method is not None
        active = run.handle.dispatch.active
        run.handle.load(folder / "adapter", name=name)
        try:
            run.handle.use(name)
            made = setting_of(method, run.model, run.handle, job, self.build(job))
        finally:
            run.handle.use(active)
            run.handle.remove(name)
        write_json(path, {**made, "probe": "adapter"})
        log.info("the setting of %s is in %s", job.name, path)
        return path

    def _give_up(self, name: str, why: str) -> None:
        self._given_up.add(name)
        why = " ".join(why.split())
        log.warning("job %s is not trained: %s", name, why)
        self.refuse(name, why)
