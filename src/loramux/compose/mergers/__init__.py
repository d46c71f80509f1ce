"""One file per merging method; the file name is the method's name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from loramux.compose.parts import Merger
from loramux.errors import LoramuxError, suggest


def merger_names() -> list[str]:
    """Names of all merging methods: the files of this package."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load_merger(name: str) -> Merger:
    """The merging method of that name. Raises with the nearest name."""
    names = merger_names()
    if name not in names:
        raise LoramuxError(f"no merging method is called {name!r}; {suggest(name, names)}")
    found: Merger = importlib.import_module(f"{__name__}.{name}").MERGER
    return found


def list_mergers() -> list[dict[str, Any]]:
    """Name, title, paper, rank of the result, whether examples are needed; all of them give a static adapter."""
    return [
        {
            "name": merger.name,
            "title": merger.title,
            "paper": merger.paper,
            "rank": merger.rank,
            "servability": "static",
            "searches": merger.searches,
        }
        for merger in map(load_merger, merger_names())
    ]
