"""Validation errors in the recipe's own words: the full path of the key, what is wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from reprlib import Repr
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from loramux.errors import RecipeError, suggest
from loramux.recipe.schema import UNION_TAGS

_Model = TypeVar("_Model", bound=BaseModel)
_Result = TypeVar("_Result")


def validated(model: type[_Model], raw: Any, where: str) -> _Model:
    """The model, or every problem of `raw` in one error."""
    return checked(where, lambda: model.model_validate(raw), model)


def checked(
    where: str, make: Callable[[], _Result], model: type[BaseModel] | None = None
) -> _Result:
    """What `make` returns; its validation errors come out as one error with full paths.

    `model` names the fields to suggest for a misspelt one.
    """
    try:
        return make()
    except ValidationError as error:
        lines = [_line(model, entry, where) for entry in error.errors()]
    raise RecipeError("; ".join(lines))


def _line(model: type[BaseModel] | None, entry: Any, where: str) -> str:
    keys = [key for key in entry["loc"] if key not in UNION_TAGS]
    path = join(where, *keys)
    if entry["type"] == "extra_forbidden" and model is not None:
        allowed = _fields_at(model, keys[:-1])
        return f"{path}: unknown key; {suggest(str(keys[-1]), allowed)}"
    message = entry["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    if not keys:
        return join(where, message) if where == "" else f"{where}: {message}"
    if entry["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {message}, got {_shown(entry['input'])}"


def _shown(value: Any) -> str:
    """A value in a message: short, also where a few lines of YAML (`&a`, `*a`) stand for millions of entries."""
    shown = Repr()
    shown.maxstring = shown.maxother = shown.maxlong = 200
    shown.maxlist = shown.maxdict = shown.maxtuple = shown.maxset = 6
    shown.maxlevel = 2
    try:
        return shown.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__} too long to show"


def _fields_at(model: type[BaseModel], keys: Sequence[str | int]) -> list[str]:
    """Field names of the nested model that `keys` lead to."""
    current = model
    for key in keys:
        field = current.model_fields.get(str(key))
        if field is None:  # a place in a list, or a name that the user chose
            continue
        current = _model_in(field.annotation) or current
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model class inside an annotation such as tuple[DataSource, ...] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def join(*keys: str | int) -> str:
    return ".".join(str(key) for key in keys if key != "")
