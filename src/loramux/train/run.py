"""From a recipe to trained adapters in a folder: base, data, methods, training, results.

The folder: run.json (the resolved recipe), checkpoints/, tensorboard/, history.json, routing.jsonl (of methods with
routers), edits.json (of methods that edit ranks), best/, adapter/, result.json; with several jobs the five before
result.json lie in a folder per job.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.train.checkpoint import CheckpointError, refuse_other
from loramux.train.events import Listener
from loramux.train.job import Job
from loramux.train.probe import PROBE, SETTING, needs_probe, with_settings
from loramux.train.watch import displays, stopped_by_signals

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.recipe import JobRecipe, Recipe
    from loramux.train.parallel import Group
    from loramux.train.trainer import JobResult, Trainer

log = logging.getLogger(__name__)
RUN, RESULT = "run.json", "result.json"
# What a run leaves behind: there without a run.json, it belongs to somebody else.
OWN = (
    "adapter",
    "best",
    "checkpoints",
    "edits.json",
    "history.json",
    "journal.jsonl",
    "probe",
    "routing.jsonl",
    "setting.json",
    "tensorboard",
    "timeline.jsonl",
    "trace.jsonl",
)


class TrainingError(LoramuxError):
    """No job of the run came to its end."""


def train_recipe(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Listener] = (),
    board: bool = True,
    shard_base: bool = False,
) -> dict[str, Any]:
    """Train every job of a recipe and write adapters, histories and logs to `out`.

    resume: go on with the run in `out` if there is one; a run that is complete is returned as it is. Without it a
    folder that holds a run is refused; a run of another recipe always is. An interrupt (Ctrl-C, SIGTERM) ends the run
    after the current step with a resumable state, and raises KeyboardInterrupt. board: False writes no TensorBoard
    files and no log of the routing, whose cost would be part of a measured training.
    Returns {"out", "adapter", "steps", "train_loss", "val_loss", "seconds", "tokens_per_second", "jobs": [...]}; with
    several jobs the losses and the adapter are under "jobs" only. Started by torchrun or accelerate, the processes
    share the work; the first one writes, and all return the same. shard_base: each of them holds a part of the base.
    """
    from loramux.train.parallel import connected

    def begin() -> tuple[bool, dict[str, Any] | None]:
        return _begin(recipe, Path(out), resume)

    def shown() -> list[Listener]:
        return [*displays(Path(out), progress, board, recipe.joint is not None), *callbacks]

    with connected(shard_base) as group:
        is_new, done = begin() if group is None else group.first(begin)
        if done is not None:
            return dict(done)
        listeners = shown() if group is None or group.is_first else []

        def settled() -> list[JobRecipe]:
            return with_settings(recipe.jobs_resolved(), Path(out), progress=progress, board=board)

        return _train(recipe, Path(out), resume, listeners, is_new, settled, group)


def _begin(recipe: Recipe, out: Path, resume: bool) -> tuple[bool, dict[str, Any] | None]:
    """Claim the folder: (whether the run is new, its result if it is complete)."""
    jobs = recipe.jobs_resolved()
    is_new = not (out / RUN).exists()
    _claim(out, jobs, resume)
    done = _result_of(out)
    if done is not None and not (recipe.joint and _is_asked_for_more(out)):
        log.info("%s: this run is complete; nothing to do", out)
        return is_new, done
    (out / RESULT).unlink(missing_ok=True)
    return is_new, None


def _train(
    recipe: Recipe,
    out: Path,
    resume: bool,
    listeners: Sequence[Listener],
    is_new: bool,
    settled: Callable[[], list[JobRecipe]],
    group: Group | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    is_first = group is None or group.is_first
    try:
        if group is not None:
            group.first(lambda: _made_ready(settled))
        jobs = settled()
        trainer = (
            build_trainer(jobs, out, resume, listeners, group)
            if recipe.joint is None
            else build_joint_trainer(recipe, jobs, out, resume, listeners, group)
        )
    except ValueError:
        if is_new and is_first:  # a recipe that is put right must not be another run
            (out / RUN).unlink()
            (out / SETTING).unlink(missing_ok=True)
        raise
    with stopped_by_signals(trainer) as was_stopped, trainer.listening():
        results = trainer.run()
    if (was_stopped() or (group and trainer.is_stopping)) and any(
        result.status == "running" for result in results
    ):
        log.info("interrupted; the same command with resume goes on after step %d", trainer.round)
        raise KeyboardInterrupt
    result = summary(out, results, time.perf_counter() - start) | trainer.figures()
    if group is not None:
        result = group.of_first(result)  # the others know no folders
    if is_first:
        _write(out / RESULT, result)
    if all(result.status == "failed" for result in results):
        raise TrainingError("; ".join(f"job {r.name}: {r.reason}" for r in results))
    return result


def _made_ready(settled: Callable[[], list[JobRecipe]]) -> None:
    """What only one process may do: fetch the base, train probes."""
    from loramux.fetch import resolve_base

    job = settled()[0]
    resolve_base(job.base, dtype=job.dtype)


def build_trainer(
    jobs: Sequence[JobRecipe],
    out: Path,
    resume: bool,
    listeners: Sequence[Listener],
    group: Group | None = None,
) -> Trainer:
    """Load the base and the data, attach every job's adapter."""
    from loramux.train.trainer import Trainer

    tokenizer = read_tokenizer(jobs[0])
    # Data first: what is wrong with it shows before the base is loaded.
    built = [build_job(job, tokenizer) for job in jobs]
    model = read_base(jobs[0])
    handle = attach_jobs(model, jobs)
    return Trainer(model, handle, built, out=out, resume=resume, listeners=listeners, group=group)


def build_joint_trainer(
    recipe: Recipe,
    jobs: Sequence[JobRecipe],
    out: Path,
    resume: bool,
    listeners: Sequence[Listener],
    group: Group | None = None,
) -> Trainer:
    """The same for jobs that share model calls, with what lets further ones in while it runs."""
    from loramux.train.joint.run import joint_trainer

    assert recipe.joint is not None
    tokenizer = read_tokenizer(jobs[0])
    built = [build_job(job, tokenizer) for job in jobs]
    model = read_base(jobs[0])
    handle = attach_jobs(model, jobs)
    return joint_trainer(
        recipe,
        built,
        model,
        handle,
        tokenizer,
        out=out,
        resume=resume,
        listeners=listeners,
        group=group,
    )


def read_tokenizer(job: JobRecipe) -> Any:
    """The tokenizer of a job's base."""
    from transformers import AutoTokenizer

    from loramux.fetch import reading_base, resolve_base

    base = resolve_base(job.base, dtype=job.dtype)
    with reading_base(job.base):
        return AutoTokenizer.from_pretrained(base)


def read_base(job: JobRecipe) -> Any:
    """The base of a job, on the device it is trained on, with as many threads as the job says."""
    import torch
    from transformers import AutoModelForCausalLM

    from loramux.fetch import reading_base, resolve_base
    from loramux.train.parallel import local_device

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    base = resolve_base(job.base, dtype=job.dtype)
    with reading_base(job.base):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, job.dtype))
    return model.to(local_device()).eval()


def build_job(job: JobRecipe, tokenizer: Any) -> Job:
    """The examples of one job with everything the trainer wants to know about it."""
    from loramux.data import load_examples, load_pairs
    from loramux.train.references import named_objective

    data = job.data
    load = load_examples if job.objective is None else load_pairs
    splits = [
        [
            example
            for source in sources
            for example in load(source, tokenizer, data.template, data.sequence_len)
        ]
        for sources in (data.train, data.validation)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Job(
        name=job.name,
        train=splits[0],
        validation=splits[1],
        training=job.training,
        seed=job.seed,
        pad_token_id=pad,
        packing=data.packing,
        sequence_len=data.sequence_len,
        priority=job.priority,
        objective=named_objective(job),
    )


def attach_jobs(model: Any, jobs: Sequence[JobRecipe]) -> Handle:
    """One adapter per job; its random start comes from the job's own seed, not from its place in the list."""
    import torch

    import loramux
    from loramux.train.references import load_reference, start_folder

    handle: Handle | None = None
    for job in jobs:
        if handle is not None:
            add_job(handle, job)
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            start = start_folder(job)
            handle = (
                loramux.attach(model, _config_of(job), name=job.name)
                if start is None
                else loramux.load(model, start, name=job.name, trainable=True)
            )
        load_reference(handle, job)
    assert handle is not None
    return handle


def add_job(handle: Handle, job: JobRecipe) -> None:
    """One more adapter, and the reference of its preferences."""
    import torch

    from loramux.train.references import load_reference, start_folder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        start = start_folder(job)
        if start is None:
            handle.add(_config_of(job), name=job.name)
        else:
            handle.load(start, name=job.name, trainable=True)
    load_reference(handle, job)


def _config_of(job: JobRecipe) -> Any:
    import loramux

    return loramux.config_from_dict({"name": job.method.name, **job.method.fields})


def summary(out: Path, results: Sequence[JobResult], seconds: float) -> dict[str, Any]:
    """The result as plain values."""
    only = results[0] if len(results) == 1 else None
    train_seconds = sum(result.seconds for result in results)
    tokens = sum(result.tokens for result in results)
    return {
        "out": str(out),
        "adapter": only.adapter if only else None,
        "steps": sum(result.steps for result in results),
        "train_loss": only.train_loss if only else None,
        "val_loss": only.val_loss if only else None,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / train_seconds, 1) if train_seconds else 0.0,
        "jobs": [asdict(result) for result in results],
    }


# --- The folder -----------------------------------------------------------------------------------


def _claim(out: Path, jobs: Sequence[JobRecipe], resume: bool) -> None:
    """Make `out` the folder of this run, or say why it cannot be."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a folder")
    # Neither changes what is trained, so a run may go on with other values.
    resolved = [
        job.model_dump(
            mode="json",
            exclude={"threads": True, "training": {"save_every"}, "priority": True, "out": True},
        )
        for job in jobs
    ]
    now = {"jobs": {job["name"]: job for job in resolved}}
    marker = out / RUN
    if not marker.exists():
        strange = [name for name in OWN if (out / name).exists()]
        if strange and not (strange == [PROBE] and needs_probe(jobs)):
            raise CheckpointError(
                f"{out} already holds {', '.join(strange)} of something else; choose another folder, or remove them"
            )
        out.mkdir(parents=True, exist_ok=True)
        _write(marker, now)
        return
    try:
        before = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(
            f"{marker} is not readable; choose another folder, or remove {out}"
        ) from None
    refuse_other(before, now, out)
    if not resume:
        raise CheckpointError(
            f"{out} already holds this run; resume it, choose another folder, or remove it to start anew"
        )


def _result_of(out: Path) -> dict[str, Any] | None:
    """The result of a run that is complete."""
    try:
        result: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    adapters = [job["adapter"] for job in result["jobs"]]
    whole = all(adapter and Path(adapter).is_dir() for adapter in adapters)
    failed = all(job["status"] == "failed" for job in result["jobs"])
    return result if whole and not failed else None


def _is_asked_for_more(out: Path) -> bool:
    """Whether a job waits in the queue of a joint run."""
    from loramux.train.joint.queue import waiting_files

    return bool(waiting_files(out))


def _write(path: Path, value: Any) -> None:
    from loramux.formats.jsonio import write_json

    write_json(path, value)
