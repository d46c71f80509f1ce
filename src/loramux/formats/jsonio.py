"""JSON as a file format: read strictly, write canonically, replace atomically.

Why strict: with a key given twice two readers see two different adapters; NaN is not JSON at all.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from loramux.formats.errors import FormatError, listed
from loramux.formats.files import read_bytes, write_bytes

CONFIG_LIMIT = 16 * 2**20


class _Duplicate(ValueError):
    pass


def parse_json(data: bytes, where: str) -> Any:
    """Any JSON value; keys given twice, NaN, infinities and broken text are refused."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except _Duplicate as error:
        raise FormatError(
            f"{where}: {error}; readers disagree about such files, keep one of them",
            code="duplicate_key",
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}", code="bad_json") from None


def read_json_object(path: Path) -> dict[str, Any]:
    value = parse_json(read_bytes(path, limit=CONFIG_LIMIT), str(path))
    if not isinstance(value, dict):
        raise FormatError(
            f"{path} holds a JSON {type(value).__name__}, expected an object", code="bad_json"
        )
    return value


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no blanks, ASCII."""
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"not expressible as JSON: {error}", code="bad_json") from None
    return text.encode("ascii")


def write_json(path: Path, value: Any) -> None:
    canonical_json(value)  # refuses what JSON cannot hold before any file is touched
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def check_keys(config: dict[str, Any], known: frozenset[str], where: str) -> None:
    """Refuse keys nobody knows, with the nearest known ones."""
    unknown = [key for key in config if key not in known]
    if not unknown:
        return
    hints = [(key, get_close_matches(key, known, n=1)) for key in unknown]
    meant = ", ".join(f"{key!r} -> {near[0]!r}" for key, near in hints if near)
    raise FormatError(
        f"{where} has unknown keys {listed(unknown)}"
        + (f"; did you mean {meant}?" if meant else "; remove them if they change nothing"),
        code="unknown_key",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _Duplicate(f"key {twice!r:.200} is given twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} does not fit a float")
    return value
