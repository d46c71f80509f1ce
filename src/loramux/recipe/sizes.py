"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from loramux.errors import RecipeError

MEASURED = "measured"  # as a limit: none, but predictions and their errors
UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str | int) -> int | None:
    """Bytes of "6GiB", "500MB" or a number; None for "measured"."""
    if text == MEASURED:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise RecipeError(
            f"{text!r} is no size of memory; write one such as 6GiB or 500MB, or {MEASURED}, which sets no limit"
        )
    return int(float(found[1]) * UNITS[found[2]])
