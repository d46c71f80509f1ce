"""What every operation on a registry works with, and what may be hung into it."""

from __future__ import annotations

import json
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
MAX_ACTOR = 200


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
    try:
        text = json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
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


def check_actor(actor: str) -> str:
    if not actor or len(actor) > MAX_ACTOR or not actor.isprintable():
        raise RegistryError(
            f"actor {actor!r:.80} is not allowed; use 1 to {MAX_ACTOR} printable characters",
            code="bad_actor",
        )
    return actor
