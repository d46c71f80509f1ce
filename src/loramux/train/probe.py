"""What some methods need before their own training: an adapter that is trained, scored and turned into a setting file.

In the folder of the run: probe/ (a complete run of its own, resumable like any other) and setting.json, which other
recipes may name. Jobs that ask for the same probe share it: it is trained on the data of all of them together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from loramux.api import Handle
    from loramux.core.method import Method, Probe
    from loramux.recipe import JobRecipe, Recipe
    from loramux.train.job import Job

log = logging.getLogger(__name__)
PROBE, SETTING = "probe", "setting.json"
ENOUGH = 256  # examples; with fewer the order of modules depends much on which ones they are
BATCH = 16


def with_settings(
    jobs: Sequence[JobRecipe], out: Path, *, progress: bool = True, board: bool = True
) -> list[JobRecipe]:
    """The jobs with a setting for every one that needs one, made in `out` unless it is there already."""
    needing = {job.name: method for job in jobs if (method := asking(job)) is not None}
    if not needing:
        return list(jobs)
    path = (out / SETTING).resolve()
    if not path.exists():
        some = [job for job in jobs if job.name in needing]
        probe = _shared(list(needing.values()))
        check_probes(some, list(needing.values()))
        recipe = probe_recipe(some, probe)
        log.info(
            "no setting is named: %s is trained first, in %s", probe.config.method, out / PROBE
        )
        from loramux.train.run import train_recipe

        train_recipe(recipe, out / PROBE, resume=True, progress=progress, board=board)
        _write_setting(path, recipe, needing[some[0].name], out / PROBE / "adapter")
        log.info("the setting is in %s; name it in method.setting to use it for other tasks", path)
    return [
        job.model_copy(update={"method": _naming(job, str(path))}) if job.name in needing else job
        for job in jobs
    ]


def probe_recipe(jobs: Sequence[JobRecipe], probe: Probe) -> Recipe:
    """One job: the probe on the data of all `jobs`, trained as the first of them."""
    from loramux.api import describe_config
    from loramux.recipe import Recipe
    from loramux.recipe.schema import MethodSpec

    first = jobs[0]
    unlike = [job.name for job in jobs if _reading(job) != _reading(first)]
    if unlike:
        raise RecipeError(
            f"jobs {unlike} read their data otherwise than {first.name!r} (template, sequence_len or packing), so they "
            "cannot share a probe; make the setting in a run of its own and name it in method.setting"
        )
    sources = {
        split: tuple(source for job in jobs for source in getattr(job.data, split))
        for split in ("train", "validation")
    }
    steps = {} if probe.steps is None else {"steps": probe.steps, "epochs": None}
    return Recipe(
        base=first.base,
        dtype=first.dtype,
        seed=first.seed,
        threads=first.threads,
        method=MethodSpec(**describe_config(probe.config)),
        data=first.data.model_copy(update=sources),
        training=first.training.model_copy(update=steps),
    )


def needs_probe(jobs: Sequence[JobRecipe]) -> bool:
    return any(asking(job) is not None for job in jobs)


def check_probes(jobs: Sequence[JobRecipe], methods: Sequence[Method]) -> None:
    """Whether a setting can serve every job, before the hours that a probe may take."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loramux.core.sites import find_sites, select_sites
    from loramux.fetch import reading_base, resolve_base

    base = jobs[0].base
    with reading_base(base):
        config = AutoConfig.from_pretrained(resolve_base(base, dtype=jobs[0].dtype))
    with torch.device("meta"):
        sites = find_sites(AutoModelForCausalLM.from_config(config))
    for job, method in zip(jobs, methods, strict=True):
        try:
            method.check_probe(select_sites(sites, method.config))
        except ValueError as error:
            raise RecipeError(f"job {job.name}: {error}") from None


def asking(job: JobRecipe) -> Method | None:
    """The method of a job that needs a probe; None for one that does not."""
    from loramux.methods import config_from_dict, load_method

    config = config_from_dict({"name": job.method.name, **job.method.fields})
    method = load_method(job.method.name)(config)
    if method.probe() is None:
        return None
    if job.objective is not None:
        raise RecipeError(
            f"job {job.name}: {method.title} trains a probe first, which learns no preferences; name a method.setting "
            "that another run made"
        )
    return method


def _shared(methods: Sequence[Method]) -> Probe:
    probes = [method.probe() for method in methods]
    first = probes[0]
    assert first is not None
    scored = {(type(m), getattr(m.config, "scorer", None)) for m in methods}
    if any(probe != first for probe in probes) or len(scored) > 1:
        raise RecipeError(
            "the jobs ask for different probes or scorers; give them one, or a recipe each, or name a method.setting"
        )
    return first


def _reading(job: JobRecipe) -> Any:
    return job.data.template, job.data.sequence_len, job.data.packing


def _naming(job: JobRecipe, path: str) -> Any:
    return job.method.model_copy(update={"setting": path})


def _write_setting(path: Path, recipe: Recipe, method: Method, adapter: Path) -> None:
    import loramux
    from loramux.formats.jsonio import write_json
    from loramux.train.run import build_job, read_base, read_tokenizer

    (job,) = recipe.jobs_resolved()
    built = build_job(job, read_tokenizer(job))
    model = read_base(job)
    handle = loramux.load(model, adapter)
    write_json(path, setting_of(method, model, handle, job, built))


def setting_of(
    method: Method, model: Any, handle: Handle, job: JobRecipe, built: Job
) -> dict[str, Any]:
    """The setting that the probe in use on the handle leads to, scored on the job's examples."""
    probe = method.probe()
    assert probe is not None
    batches = held_out(built, probe.rows)
    made = method.score_probe(handle, batches)
    about = {
        "base": {"name": job.base, "config_sha256": _digest(model)},
        "data": {
            "train": [source.path for source in job.data.train],
            "rows": sum(int(batch["input_ids"].shape[0]) for batch in batches),
        },
        "seed": job.seed,
    }
    return {**made, **about}


def held_out(job: Job, rows: int) -> list[dict[str, Tensor]]:
    """Batches of examples to score on: of the validation data, else of the training data."""
    import torch

    from loramux.data import collate

    pool = job.validation or job.train
    if not job.validation:
        log.info("there is no validation data: modules are scored on training data")
    draw = torch.Generator().manual_seed(job.seed)
    chosen = [pool[i] for i in torch.randperm(len(pool), generator=draw)[:rows].tolist()]
    if len(chosen) < ENOUGH:
        log.warning(
            "modules are scored on %d examples; below %d their order is noisy (see `agreement` in the setting)",
            len(chosen), ENOUGH,
        )  # fmt: skip
    # At least three batches, since the choices of three disjoint parts are compared.
    size = max(1, min(BATCH, len(chosen) // 3))
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [collate(part, job.pad_token_id) for part in parts]


def _digest(model: Any) -> str:
    import hashlib

    text: str = model.config.to_json_string(use_diff=False)
    return hashlib.sha256(text.encode()).hexdigest()
