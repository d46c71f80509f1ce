"""Ways to put trained adapters together: which there are, and what may be set for each.

Every merging method and every method over frozen adapters is one, by its own name; so one that is added to either list
can be compared without a line here. Options are checked and completed as the merge or the method itself would.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loramux.compare.schema import OwnTraining, SuiteError
from loramux.errors import LoramuxError, RecipeError, suggest

BASE, EACH, ORACLE = "base", "each", "oracle"
LAMBDA, TRAINING, ADAPTERS = "lam", "training", "adapters"
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """kind: merge makes one static adapter; route is a router without training; learn has gates that are trained."""

    name: str
    kind: Literal["base", "each", "oracle", "merge", "route", "learn"]
    searches: bool = False  # a merge that looks at training rows


def ways() -> dict[str, Way]:
    """All ways by name, in the order of the tables."""
    from loramux.compose.mergers import load_merger, merger_names
    from loramux.methods import load_method, method_names

    found = [Way(BASE, "base"), Way(EACH, "each"), Way(ORACLE, "oracle")]
    found += [Way(name, "merge", load_merger(name).searches) for name in merger_names()]
    for name in method_names():
        method = load_method(name)
        if method.needs_adapters:
            found.append(Way(name, "learn" if method.learns else "route"))
    return {way.name: way for way in found}


def check_options(where: str, way: Way, options: Options, tasks: Sequence[str]) -> None:
    """Refuse what a way does not know or what its values may not be. Raises SuiteError that names the key."""
    try:
        if way.kind == "merge":
            _check_merge(where, way, options)
        elif way.kind in ("route", "learn"):
            _check_method(where, way, options, tasks)
        elif options:
            raise SuiteError(f"{where}.{next(iter(options))}: {way.name} has no options")
    except RecipeError as error:
        raise SuiteError(str(error)) from None


def own_training(way: Way, options: Options) -> dict[str, Any]:
    """What the options change of the training: nothing that changes which tokens are seen."""
    given = options.get(TRAINING, {})
    return OwnTraining(**given).model_dump(exclude_none=True) if way.kind == "learn" else {}


def fields_of(options: Options) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != TRAINING}


def settings(way: Way, options: Options, tasks: Sequence[str]) -> dict[str, Any]:
    """The options with all defaults: one that changes makes another result."""
    import loramux
    from loramux.compose.mergers import load_merger
    from loramux.compose.run import make_options

    fields = fields_of(options)
    if way.kind == "merge":
        lam = fields.pop(LAMBDA, 1.0)
        return {LAMBDA: lam, **dataclasses.asdict(make_options(load_merger(way.name), fields))}
    return loramux.config_from_dict({"name": way.name, ADAPTERS: list(tasks), **fields}).to_dict()


def _check_merge(where: str, way: Way, options: Options) -> None:
    from pydantic import TypeAdapter

    from loramux.compose.mergers import load_merger
    from loramux.core.values import is_number
    from loramux.recipe.problems import checked

    merger = load_merger(way.name)
    allowed = [field.name for field in dataclasses.fields(merger.options)]
    allowed += [] if way.searches else [LAMBDA]
    for name in options:
        if name not in allowed:
            raise SuiteError(f"{where}.{name}: unknown key; {suggest(name, allowed)}")
    if LAMBDA in options and not is_number(options[LAMBDA]):
        raise SuiteError(f"{where}.{LAMBDA}: must be a finite number, got {options[LAMBDA]!r}")
    text = json.dumps({name: value for name, value in options.items() if name != LAMBDA})
    kind = TypeAdapter(merger.options)
    try:
        checked(where, lambda: kind.validate_json(text, strict=True))
    except RecipeError:
        raise
    except LoramuxError as error:
        raise SuiteError(f"{where}: {error}") from None


def _check_method(where: str, way: Way, options: Options, tasks: Sequence[str]) -> None:
    from loramux.recipe import MethodSpec, check_method
    from loramux.recipe.problems import validated

    if ADAPTERS in options:
        raise SuiteError(f"{where}.{ADAPTERS}: they are those of the suite's tasks; leave it out")
    if TRAINING in options and way.kind != "learn":
        raise SuiteError(f"{where}.{TRAINING}: {way.name} is not trained; leave it out")
    validated(OwnTraining, options.get(TRAINING, {}), f"{where}.{TRAINING}")
    check_method(MethodSpec(name=way.name, adapters=list(tasks), **fields_of(options)), where)
