"""Errors that are the user's to fix: each says what was given, what is allowed and what to do.

Why subclasses of ValueError: library users catch what they already know; the command line turns these, and only
these, into one line on standard error.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType


class LoramuxError(ValueError):
    """Something the user can put right."""


class RecipeError(LoramuxError):
    """A recipe, or a value set over it, is not valid."""


class DataError(LoramuxError):
    """A data file or a row of it cannot be used."""


class FetchError(LoramuxError):
    """A base model cannot be found, downloaded or converted."""


class MissingExtraError(LoramuxError):
    """An optional package is needed for what was asked."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks something of its own is a different problem.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {module.split('.')[0]!r}; "
            f"install it with: pip install 'loramux[{extra}]'"
        ) from None


def suggest(given: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name: "did you mean 'x'?" where one is close, then everything allowed."""
    names = list(allowed)
    close = get_close_matches(given, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"
