"""One file per paper; the file name is the method's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.core.method import Method, MethodConfig


def method_names() -> list[str]:
    """Names of all methods: the files of this package, then the `loramux.methods` entry points of other packages."""
    return [*own_names(), *_entry_points()]


def own_names() -> list[str]:
    """Names of the methods that are files of this package."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="loramux.methods")}


def load_method(name: str) -> type[Method]:
    """The class of a method. Raises ValueError with the nearest name."""
    if name in own_names():
        module = importlib.import_module(f"{__name__}.{name}")
        method: type[Method] = module.METHOD
        return method
    points = _entry_points()
    if name in points:
        loaded: type[Method] = points[name].load()
        return loaded
    near = difflib.get_close_matches(name, method_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no method named {name!r}{hint} There are {method_names()}")


def config_from_dict(settings: Mapping[str, Any]) -> MethodConfig:
    """{"name": "milora", ...fields} -> its frozen config. Unknown fields are errors with the nearest name."""
    given = dict(settings)
    if "name" not in given:
        raise ValueError(f"a method needs a 'name'; there are {method_names()}")
    config_class = load_method(given.pop("name")).config_class
    known = [f.name for f in fields(config_class)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{config_class.__name__} has no field {key!r}{hint}")
    return config_class(**given)


def list_methods() -> list[dict[str, str]]:
    """Name, paper, granularity, routing unit and servability of every method."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "granularity": method.granularity,
            "routing_unit": method.routing_unit,
            "servability": method.servability,
        }
        for method in map(load_method, method_names())
    ]
