"""A recipe from its file: YAML, overrides from the command line, and paths relative to the file.

Why a loader of our own: YAML 1.1 reads `1e-4` as text and lets the second of two equal keys win in silence.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from loramux.errors import RecipeError
from loramux.recipe.problems import validated
from loramux.recipe.schema import DEMO_PREFIX, JobPatch, JobRecipe, Recipe

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".pq")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe; every job of it is complete afterwards.

    Relative data paths are taken from the recipe's folder. `overrides` are "a.b=value" with a YAML value; a number
    in the path names an entry of a list.
    """
    path = Path(path)
    raw = read_mapping(path, "base, method, data and training")
    for text in overrides:
        raw = override(raw, text)
    try:
        recipe = parse_recipe(_with_paths_from(raw, path.parent.resolve()))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return recipe


def read_mapping(path: Path, keys: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; `keys` are named where it holds something else."""
    try:
        raw = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: must hold keys such as {keys}")
    return raw


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Check a recipe that is already a mapping."""
    recipe = validated(Recipe, raw, "")
    recipe.jobs_resolved()
    return recipe


def override(raw: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A copy with one "a.b=value" set; missing mappings on the way are made."""
    path, equals, value_text = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {text!r}: must look like KEY=VALUE, such as section.key=3")
    try:
        value = _yaml(value_text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML") from None
    result = deepcopy(dict(raw))
    target: Any = result
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                raise RecipeError(
                    f"--set {text!r}: {'.'.join(keys[:i])} is a list of {len(target)}; "
                    f"{key!r} is not one of its positions 0..{len(target) - 1}"
                )
            slot: Any = int(key)
        elif isinstance(target, dict):
            slot = key
            if not last and target.get(key) is None:
                target[key] = {}
        else:
            raise RecipeError(
                f"--set {text!r}: {'.'.join(keys[:i])} is a plain value, not a mapping"
            )
        if last:
            target[slot] = value
        else:
            target = target[slot]
    return result


def load_job(path: Path, recipe: Recipe) -> JobRecipe:
    """One further job for a recipe, from a file that holds what an entry of `jobs` may; named like the file if it
    says no name. Relative paths are taken from the file's folder."""
    raw = {"name": path.stem, **read_mapping(path, "name, method, data and training")}
    placed_raw = _with_paths_from({"jobs": [raw]}, path.parent.resolve())
    try:
        patch = validated(JobPatch, placed_raw["jobs"][0], "")
        (job,) = recipe.model_copy(update={"jobs": (patch,)}).jobs_resolved()
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return job


def placed_job(path: Path) -> str:
    """The YAML of a job's file, its relative paths made absolute, so that it may lie elsewhere."""
    raw = {"name": path.stem, **read_mapping(path, "name, method, data and training")}
    placed_raw = _with_paths_from({"jobs": [raw]}, path.parent.resolve())
    return yaml.safe_dump(placed_raw["jobs"][0], sort_keys=False, allow_unicode=True)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    job = schema["$defs"]["JobPatch"]["properties"]
    kinds = {"data": "DataConfig", "training": "TrainingConfig", "objective": "DpoConfig"}
    for key, name in kinds.items():
        job[key] = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}], "default": None}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "loramux recipe"
    return schema


def dump_recipe(recipe: Recipe | JobRecipe) -> str:
    """YAML that `load_recipe` reads back, with every default written out."""
    raw = recipe.model_dump(mode="json")
    if isinstance(recipe, JobRecipe):
        own = {key: raw.pop(key) for key in ("name", "priority", "out")}
        raw["jobs"] = [{key: value for key, value in own.items() if value}]
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _with_paths_from(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy whose relative paths start at `folder`, made absolute."""
    result = deepcopy(dict(raw))
    jobs = result.get("jobs")
    holders = (
        [result, *(job for job in jobs if isinstance(job, dict))] if _is_list(jobs) else [result]
    )
    if isinstance(result.get("base"), str):
        result["base"] = placed(result["base"], folder, is_path=False)
    for holder in holders:
        if isinstance(holder.get("out"), str):
            holder["out"] = str(folder / Path(holder["out"]).expanduser())
        data, method = holder.get("data"), holder.get("method")
        for split in ("train", "validation"):
            sources = data.get(split) if isinstance(data, dict) else None
            for source in sources if _is_list(sources) else ():
                if isinstance(source, dict) and isinstance(source.get("path"), str):
                    source["path"] = placed(source["path"], folder, is_path=True)
        # A method over trained adapters names their folders.
        folders = method.get("adapters") if isinstance(method, dict) else None
        if isinstance(method, dict) and _is_list(folders):
            method["adapters"] = [placed(entry, folder, is_path=True) for entry in folders]
        # A setting lies in the folder of the run that made it, so it may well start where the command runs.
        if isinstance(method, dict) and isinstance(method.get("setting"), str):
            method["setting"] = placed(method["setting"], folder, is_path=False)
        objective = holder.get("objective")
        named = objective.get("reference") if isinstance(objective, dict) else None
        if isinstance(objective, dict) and isinstance(named, str) and named != "base":
            objective["reference"] = placed(named, folder, is_path=False)
    return result


def placed(text: Any, folder: Path, *, is_path: bool) -> Any:
    """What a file in `folder` means: what exists there wins; a name that does not exist there may be a hub id."""
    if not isinstance(text, str) or not text or text.startswith(DEMO_PREFIX):
        return text
    beside = folder / Path(text).expanduser()
    looks_local = text[0] in "./~" or Path(text).suffix in _DATA_SUFFIXES
    return str(beside) if beside.exists() or (is_path and looks_local) else text


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _yaml(text: str) -> Any:
    # The loader is a SafeLoader: it makes plain values only.
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML lets through what its parts raise about 2001-99-99, `!!int x`, a number of 5,000 digits, ...
        raise yaml.YAMLError(f"a value of it cannot be read: {str(error)[:200]}") from None
