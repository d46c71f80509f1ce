"""Memory sizes as people write them: 4096, "512MiB", "1.5 GB"."""

from __future__ import annotations

import re

UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(size: int | str, name: str) -> int:
    """Bytes. `name` is the option, for the message. Raises ValueError."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = UNITS.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(
            f"{name} must be a number of bytes or a text such as '512MiB', got {size!r}; units are {', '.join(UNITS)}"
        )
    return int(float(match[1]) * unit)
