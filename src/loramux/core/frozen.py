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
    """`runs/snips/adapter`, `runs/clinc/adapter` -> `snips`, `clinc`. Raises ValueError where paths are equal."""
    parts = [PurePath(path).parts for path in paths]
    for back in range(1, min((len(p) for p in parts), default=0) + 1):
        names = [NOT_IN_NAMES.sub("-", p[-back].lower()).strip("-._") or "adapter" for p in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    raise ValueError(
        f"the adapters need folders that differ in one part of their path, got {list(paths)}"
    )
