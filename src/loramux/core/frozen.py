"""What methods over frozen trained adapters share: the folders, their order, and the names of the experts.

Why the order matters: a gate has one output per adapter. Saved beside its experts it keeps their names in order, and
another order is refused on loading.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from loramux.core.method import MethodConfig

NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(MethodConfig):
    """adapters: folders of trained LoRAs (PEFT layout), in gate order. Their own ranks, scales and targets hold."""

    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.adapters, list):
            object.__setattr__(self, "adapters", tuple(self.adapters))
        if not isinstance(self.adapters, tuple) or not all(
            isinstance(folder, str) for folder in self.adapters
        ):
            raise ValueError(f"adapters must be a list of folders, got {self.adapters!r}")
        if self.use_dora:
            raise ValueError(
                f"{self.method} decides over adapters that are trained already: use_dora does not apply"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in gate order: the part of their paths, from the end, that tells them apart."""
        return expert_names(self.adapters)


def expert_names(paths: Sequence[str]) -> tuple[str, ...]:
    """`runs/snips/adapter`, `runs/clinc/adapter` -> `snips`, `clinc`. Raises ValueError where paths are equal.

    The last part of the paths that tells them apart, else the last two neighbouring ones, else the last and a number.
    """
    if len({PurePath(path) for path in paths}) < len(paths):
        raise ValueError(f"every adapter needs a folder of its own, got {list(paths)}")
    parts = [PurePath(path).parts for path in paths]
    shortest = min((len(p) for p in parts), default=0)
    for width in (1, 2):
        for back in range(width, shortest + 1):
            names = [_name(p[len(p) - back : len(p) - back + width]) for p in parts]
            if len(set(names)) == len(names):
                return tuple(names)
    return tuple(f"{_name(p[-1:])}-{number}" for number, p in enumerate(parts, start=1))


def _name(parts: Sequence[str]) -> str:
    return NOT_IN_NAMES.sub("-", "-".join(parts).lower()).strip("-._") or "adapter"
