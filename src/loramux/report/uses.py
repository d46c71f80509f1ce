"""Router statistics of recorded steps, brought together: one entry per router, weighted by what was counted.

Letters: C columns (experts or modules) of a router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RouterUse:
    """One router over the steps that are shown. `pairs` [C, C] is NaN where nothing was counted."""

    path: str
    layer: int
    columns: tuple[str, ...]
    count: int
    unit: str
    entropy: float
    share: Any  # [C]
    pairs: Any  # [C, C]

    @property
    def dead(self) -> int:
        return int((self.share == 0).sum())

    @property
    def violation(self) -> float:
        return float(len(self.share) * self.share.max() - 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "layer": self.layer,
            "columns": list(self.columns),
            "count": self.count,
            "entropy": round(self.entropy, 5),
            "dead": self.dead,
            "max_violation": round(self.violation, 5),
            "share": [round(float(value), 5) for value in self.share],
        }


def later_half(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows after half of the last step; at least one."""
    last = rows[-1]["step"]
    return [row for row in rows if row["step"] > last / 2] or [rows[-1]]


def merge(rows: Sequence[Mapping[str, Any]]) -> list[RouterUse]:
    """One entry per router, means over the rows weighted by their counts, by layer."""
    found: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for row in rows:
        names = [tuple(map(str, columns)) for columns in row["columns"]]
        for router in row["routers"]:
            found.setdefault((router["path"], names[router["columns"]]), []).append(router)
    uses = [_use(path, columns, entries) for (path, columns), entries in found.items()]
    return sorted(uses, key=lambda use: use.layer)


def _use(path: str, columns: tuple[str, ...], entries: Sequence[Mapping[str, Any]]) -> RouterUse:
    counts = np.array([entry["count"] for entry in entries], dtype=float)
    share = np.average([entry["share"] for entry in entries], axis=0, weights=counts)
    pairs = np.zeros((len(columns), len(columns)))
    for entry, weight in zip(entries, counts / counts.sum(), strict=True):
        for i, j, value in entry["pairs"]:
            pairs[i, j] += weight * value
            pairs[j, i] += weight * value
    if not any(entry["pairs"] for entry in entries):
        pairs[:] = np.nan
    np.fill_diagonal(pairs, np.nan)
    when = entries[0]["when"]
    return RouterUse(
        path=path,
        layer=int(entries[0]["layer"]),
        columns=columns,
        count=int(counts.sum()),
        unit="prompts" if when == "prompt" else "tokens",
        entropy=float(np.average([entry["entropy"] for entry in entries], weights=counts)),
        share=share,
        pairs=pairs,
    )


def kind_of(columns: Sequence[str]) -> str:
    """What the columns of a router are: numbered experts, modules by their paths, or adapters by their names."""
    if all(name.isdigit() for name in columns):
        return "expert"
    return "module" if all("." in name for name in columns) else "adapter"


def columns_of(uses: Sequence[RouterUse]) -> list[str]:
    return list(dict.fromkeys(name for use in uses for name in use.columns))
