"""A suite from its file: paths relative to the file, tasks by folder, and every name checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from loramux.compare.schema import LABEL, Suite, SuiteError
from loramux.errors import RecipeError, suggest
from loramux.recipe import check_method
from loramux.recipe.load import placed, read_mapping
from loramux.recipe.problems import validated

SPLITS = ("train", "validation", "test")


def load_suite(path: str | Path) -> Suite:
    """Read and check a suite; relative paths are taken from its folder. Raises SuiteError with the key at fault."""
    path = Path(path)
    try:
        raw = read_mapping(path, "name, base, budget, tasks and methods")
        return parse_suite(raw, path.parent.resolve())
    except RecipeError as error:
        raise SuiteError(str(error)) from None
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from None


def parse_suite(raw: Mapping[str, Any], folder: Path | None = None) -> Suite:
    """Check a suite that is already a mapping."""
    try:
        suite = validated(Suite, _written_out(raw, folder or Path.cwd()), "")
    except RecipeError as error:
        raise SuiteError(str(error)) from None
    _check_methods(suite)
    _check_fusion(suite)
    _check_metric(suite)
    return suite


def _written_out(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy with tasks as three sources each, the suite's row counts in them, and paths made absolute."""
    result = deepcopy(dict(raw))
    if isinstance(result.get("base"), str):
        result["base"] = placed(result["base"], folder, is_path=False)
    tasks = result.get("tasks")
    if not isinstance(tasks, dict):
        return result
    rows = {split: result.get(f"{split}_rows") for split in SPLITS}
    for name, given in tasks.items():
        if not isinstance(name, str) or not re.match(LABEL, name):
            raise SuiteError(f"tasks: {name!r} must be letters, digits and any of ._+-")
        tasks[name] = _task(name, given, rows, folder)
    return result


def _task(name: str, given: Any, rows: Mapping[str, Any], folder: Path) -> Any:
    if isinstance(given, str):
        given = {split: f"{given.rstrip('/')}/{split}.jsonl" for split in SPLITS}
        if not rows["validation"]:
            del given["validation"]
    if not isinstance(given, dict):
        return given
    for split in SPLITS:
        source = given.get(split)
        if isinstance(source, str):
            source = given[split] = {"path": source}
        if isinstance(source, dict):
            if isinstance(source.get("path"), str):
                source["path"] = placed(source["path"], folder, is_path=True)
            if rows[split]:
                source.setdefault("rows", rows[split])
            # Scores are found by the task's name in the suite, whatever the rows call themselves.
            source.setdefault("task", name)
    return given


def _check_methods(suite: Suite) -> None:
    for label, entry in suite.methods.items():
        where = f"methods.{label}"
        if not re.match(LABEL, label):
            raise SuiteError(f"methods: {label!r} must be letters, digits and any of ._+-")
        try:
            method = check_method(entry.method, f"{where}.method")
        except RecipeError as error:
            raise SuiteError(str(error)) from None
        if method.needs_adapters:
            raise SuiteError(
                f"{where}: {entry.method.name} composes trained adapters; name it under fusion.methods"
            )
        fields = method.config_class.__dataclass_fields__
        if entry.match is not None and entry.match not in fields:
            raise SuiteError(
                f"{where}.match: {entry.method.name} has no field {entry.match!r}; "
                f"{suggest(entry.match, fields)}"
            )


def _check_fusion(suite: Suite) -> None:
    from loramux.compare.ways import check_options, ways

    if suite.fusion is None or suite.fusion.methods is None:
        return
    known, tasks = ways(), list(suite.fusion.tasks or suite.tasks)
    for name, options in suite.fusion.methods.items():
        if name not in known:
            raise SuiteError(f"fusion.methods: no way called {name!r}; {suggest(name, known)}")
        check_options(f"fusion.methods.{name}", known[name], options, tasks)


def _check_metric(suite: Suite) -> None:
    from loramux.eval.run import METRICS

    allowed = [name for name in METRICS if name != "bleu"]
    if suite.metric not in allowed:
        raise SuiteError(
            f"metric: {suite.metric!r} has no score per row to compare; {suggest(suite.metric, allowed)}"
        )
