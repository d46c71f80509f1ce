"""Complete jobs out of a recipe: defaults of the top level, the changes of each job, the fields of each method."""

from __future__ import annotations

import json
from dataclasses import fields as dataclass_fields
from typing import Any

from pydantic import TypeAdapter

from loramux.errors import RecipeError, suggest
from loramux.recipe.problems import checked, join, validated
from loramux.recipe.schema import JobPatch, JobRecipe, MethodSpec, Recipe

FALLBACK_LEARNING_RATE = 1e-4


def resolve_jobs(recipe: Recipe) -> list[JobRecipe]:
    """Every job with nothing left open, or the first thing that is wrong with one."""
    if recipe.jobs == ():
        raise RecipeError("jobs: the list is empty; leave it out for a single job")
    patches = recipe.jobs or (JobPatch(name="default"),)
    names = [patch.name for patch in patches]
    if len(set(names)) != len(names):
        raise RecipeError(f"jobs: names must differ, got {names}")
    wheres = [f"jobs.{i}" if recipe.jobs else "" for i in range(len(patches))]
    return [_resolve(recipe, *pair) for pair in zip(patches, wheres, strict=True)]


def _resolve(recipe: Recipe, patch: JobPatch, where: str) -> JobRecipe:
    top = recipe.model_dump(exclude_unset=True)
    raw = {
        "name": patch.name,
        "base": recipe.base,
        "dtype": recipe.dtype,
        "threads": recipe.threads,
        "seed": recipe.seed if patch.seed is None else patch.seed,
        "method": _method_of(recipe, patch),
        "data": {**top.get("data", {}), **(patch.data or {})},
        "training": _training_of(top.get("training", {}), patch.training or {}),
        "objective": _objective_of(recipe, patch),
        "priority": patch.priority,
        "out": patch.out,
    }
    if not raw["method"]:
        raise RecipeError(f"{join(where, 'method')}: missing; e.g. method: {{name: lora, r: 8}}")
    job = validated(JobRecipe, raw, where)
    method = check_method(job.method, join(where, "method"))
    if job.training.learning_rate is not None:
        return job
    rate = getattr(method, "default_learning_rate", None) or FALLBACK_LEARNING_RATE
    training = job.training.model_copy(update={"learning_rate": rate})
    return job.model_copy(update={"training": training})


def _method_of(recipe: Recipe, patch: JobPatch) -> dict[str, Any]:
    """A job that names another method starts from that method's defaults, not from the top level's fields."""
    own = patch.method or {}
    top = recipe.method
    if top is None or own.get("name", top.name) != top.name:
        return own
    return {**top.model_dump(), **own}


def _objective_of(recipe: Recipe, patch: JobPatch) -> dict[str, Any] | None:
    """A job's own keys over the top level's; `{name: sft}` is what there is without an objective."""
    top = {} if recipe.objective is None else recipe.objective.model_dump()
    own = patch.objective or {}
    if top and own.get("name", top["name"]) != top["name"]:
        top = {}
    return {**top, **own} or None


def _training_of(top: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A job's `steps` replaces the top level's `epochs` and the other way round."""
    kept = dict(top)
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if own.get(given) is not None:
            kept.pop(other, None)
    return {**kept, **own}


def check_method(spec: MethodSpec, where: str = "method") -> Any:
    """Check name, field names and values of a method; returns its class."""
    from loramux import methods

    try:
        method = methods.load_method(spec.name)
    except ValueError as error:
        raise RecipeError(f"{where}.name: {error}") from None
    allowed = [f.name for f in dataclass_fields(method.config_class) if f.init]
    for key in spec.fields:
        if key not in allowed:
            raise RecipeError(f"{where}.{key}: unknown key; {suggest(key, allowed)}")
    # In JSON mode a list may stand for a tuple, and otherwise the types must be exact: nothing converts them later.
    text = json.dumps(spec.fields)
    checked(where, lambda: TypeAdapter(method.config_class).validate_json(text, strict=True))
    return method
