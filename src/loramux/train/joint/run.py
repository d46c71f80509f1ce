"""A joint run from a recipe: its trainer, queue folder and socket, and adapters copied to where jobs want them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import RecipeError
from loramux.formats.peft import CONFIG_NAME, MIXTURE_NAME
from loramux.recipe import JobRecipe, Recipe, load_job
from loramux.recipe.load import read_mapping
from loramux.train.events import Listener
from loramux.train.job import Job
from loramux.train.joint.control import Control
from loramux.train.joint.probes import THEN, ProbedJobs
from loramux.train.joint.queue import QUEUE, QueueFolder
from loramux.train.joint.schedulers import make_scheduler
from loramux.train.joint.table import details, rows, totals
from loramux.train.joint.trainer import JointTrainer
from loramux.train.run import add_job, build_job

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.train.parallel import Group
    from loramux.train.trainer import Trainer

log = logging.getLogger(__name__)
SHARED = ("base", "dtype")  # of all jobs of a run


class Copies(Listener):
    """Puts a copy of a finished adapter where its job said; it stays in the run's own folder too."""

    def __init__(self, jobs: Sequence[JobRecipe]):
        self.wanted: dict[str, Path] = {}
        for job in jobs:
            self.expect(job)

    def expect(self, job: JobRecipe) -> None:
        """Raises where the copy would take the place of something that is no adapter."""
        if not job.out:
            return
        target = Path(job.out)
        _check_target(target, job.name)
        for other, its in self.wanted.items():
            if other != job.name and its.resolve() == target.resolve():
                raise RecipeError(
                    f"jobs {other!r} and {job.name!r}: out names {job.out!r} for both; give each its own folder"
                )
        self.wanted[job.name] = target

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        assert trainer.out is not None
        source = trainer.out / job / "adapter"
        target = self.wanted.get(job)
        if target is None or not source.is_dir():
            return
        try:
            _check_target(target, job)  # once more: hours may have gone by
            part = target.with_name(f".{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source, part)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
        except (RecipeError, OSError) as error:  # the other jobs go on
            log.warning("the adapter of job %s is in %s alone: %s", job, source, error)


def _check_target(target: Path, job: str) -> None:
    """What lies there goes away, so it must be an adapter, or nothing."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not any((target / name).is_file() for name in (CONFIG_NAME, MIXTURE_NAME)):
        raise RecipeError(
            f"job {job!r}: out names {str(target)!r}, which is there and is no adapter; name a new folder, or one "
            "that holds an adapter to be replaced"
        )


def joint_trainer(
    recipe: Recipe,
    jobs: Sequence[Job],
    model: Any,
    handle: Handle,
    tokenizer: Any,
    *,
    out: Path,
    resume: bool,
    listeners: Sequence[Listener],
    group: Group | None = None,
) -> JointTrainer:
    """The trainer of the recipe's jobs, with what lets further ones in while it runs."""
    assert recipe.joint is not None
    trainer: JointTrainer
    copies = Copies(recipe.jobs_resolved())

    def read(path: Path) -> JobRecipe:
        given = read_mapping(path, "name, method, data and training")
        for key in SHARED:
            if key in given:
                raise RecipeError(
                    f"{path}: {key} is that of the run ({getattr(recipe, key)}), all jobs share one base; "
                    "leave it out, or start a run of its own"
                )
        return load_job(path, recipe)

    def load(value: Any) -> Job:
        job = JobRecipe.model_validate({k: v for k, v in value.items() if k != THEN})
        copies.expect(job)
        built = build_job(job, tokenizer)
        add_job(handle, job)
        return built

    def written() -> list[Any]:
        added = [c.value for _, c in trainer.journal.rows if c.what == "add"]
        return [value.get(THEN, value) for value in added]

    folder = QueueFolder(out / QUEUE, read, written)
    probed = ProbedJobs(
        folder, lambda: trainer, lambda job: build_job(job, tokenizer), folder.note_refusal
    )
    questions = {
        "list": lambda _: {"jobs": rows(trainer), "run": totals(trainer)},
        "show": lambda name: details(trainer, name),
    }
    control = Control(out, questions, [probed], recipe.joint.stay)
    trainer = JointTrainer(
        model,
        handle,
        jobs,
        out=out,
        resume=resume,
        listeners=[*listeners, copies] if group is None or group.is_first else [],
        group=group,
        scheduler=make_scheduler(recipe.joint),
        memory=recipe.joint.memory,
        max_tokens=recipe.joint.max_tokens,
        inbox=control,
        load=load,
    )
    return trainer
