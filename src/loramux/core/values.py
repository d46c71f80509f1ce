"""Checks of single config values: each error says what was given and what is allowed.

Why not annotations alone: a dataclass checks no types, and `True` is an int, NaN passes most comparisons.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, get_type_hints


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """An int from `least`; bools and floats are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer from {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    if not is_number(value) or value < 0:
        raise ValueError(f"{name} must be a finite number from 0, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def check_booleans(config: Any) -> None:
    """The fields of a dataclass that are annotated as bool; 'no' and 0 are none, and would be read as true or false."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if hints[field.name] is bool and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be true or false, got {value!r}")


def check_regex(name: str, value: str, pattern: str | None = None) -> None:
    """`value` is what the user wrote, `pattern` what is matched with it."""
    try:
        re.compile(value if pattern is None else pattern)
    except re.error as error:
        raise ValueError(
            f"{name} must be a regular expression, got {value!r}: {error}; list the names of linears instead, or "
            "escape what is meant literally"
        ) from None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
