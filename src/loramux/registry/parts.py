"""What every operation on a registry works with, and what may be hung into it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, Engine

from loramux.registry.blobs import Blobs
from loramux.registry.errors import RegistryError
from loramux.registry.types import Version

MAX_JSON_BYTES = 16 * 1024
MAX_DEPTH = 16  # deeper ones would end the recursion of whoever lists them
MAX_ACTOR = 200
MAX_WORD = 1000
_SURROGATE = re.compile("[\ud800-\udfff]")


class Keeper(Protocol):
    """Stores what belongs to a version elsewhere (a retrieval profile) inside the publishing transaction.

    Raising anything undoes the publish.
    """

    def __call__(self, connection: Connection, version: Version, samples: Any) -> None: ...


def _no_step(_: str) -> None:
    """Between steps nothing happens; the crash test kills here."""


@dataclass(frozen=True)
class Parts:
    """`clock`: seconds since 1970. `step` is told where publishing has got to."""

    database: Engine
    blobs: Blobs
    cache: Path
    clock: Callable[[], float] = time.time
    step: Callable[[str], None] = _no_step
    keepers: tuple[Keeper, ...] = field(default=())


def as_json(value: Mapping[str, Any], what: str) -> str:
    """Canonical text of a small JSON object."""
    if _is_deeper(value, MAX_DEPTH):
        raise RegistryError(
            f"{what} is nested deeper than {MAX_DEPTH} levels; make it flatter", code="bad_metadata"
        )
    try:
        text = json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
        # Half a surrogate pair is text to JSON, but to no database and to no answer in UTF-8.
        json.dumps(dict(value), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RegistryError(
            f"{what} is not a JSON object ({str(error)[:100]}); use text, numbers, lists and objects",
            code="bad_metadata",
        ) from None
    if len(text) > MAX_JSON_BYTES:
        raise RegistryError(
            f"{what} has {len(text):,} bytes of JSON, at most {MAX_JSON_BYTES:,} are kept; "
            "put long texts elsewhere and refer to them",
            code="bad_metadata",
        )
    return text


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, list | tuple) and (
        levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
    )


def check_text(what: str, text: str | None) -> None:
    """Refuse what a database cannot be asked for: NUL, half a surrogate pair, more than any name or word has."""
    if text is None or (len(text) <= MAX_WORD and "\0" not in text and not _SURROGATE.search(text)):
        return
    raise RegistryError(
        f"{what} {text!a:.80} cannot be looked for; use at most {MAX_WORD} characters of proper Unicode, without "
        "NUL",
        code="bad_query",
    )


def check_actor(actor: str) -> str:
    if not actor or len(actor) > MAX_ACTOR or not actor.isprintable():
        raise RegistryError(
            f"actor {actor!r:.80} is not allowed; use 1 to {MAX_ACTOR} printable characters",
            code="bad_actor",
        )
    return actor
