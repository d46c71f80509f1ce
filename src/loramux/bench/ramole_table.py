"""What the rows of the RAMoLE evaluation add up to: means over tasks, spread over seeds, paired differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Row = Mapping[str, Any]
WAYS = (
    ("base", "", "base, no adapter"),
    ("oracle", "", "own adapter (oracle)"),
    ("selection", "iid", "Selection, IID"),
    ("mixture", "iid", "Mixture k=3, IID"),
    ("ramole", "iid", "RAMoLE k=3, IID"),
    ("selection", "ood", "Selection, OOD"),
    ("mixture", "ood", "Mixture k=3, OOD"),
    ("ramole", "ood", "RAMoLE k=3, OOD"),
)


def table(rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    """The whole printed result, of the ways and seeds that have all tasks."""
    rows = _complete(rows, len(found["iid"]))
    lines = [f"{'way':<22} {'mean':>6} {'over seeds':>15} {'against Mixture':>20}"]
    for way, setting, title in WAYS:
        by_seed = _by_seed(rows, way, setting)
        if not by_seed:
            continue
        means = [mean_of(own) for own in by_seed.values()]
        spread = f"{min(means):.3f} - {max(means):.3f}" if len(means) > 1 else ""
        lines.append(
            f"{title:<22} {fmean(means):6.3f} {spread:>15} {_gain(rows, way, setting):>20}"
        )
    lines += [*_split(rows), *_attention(rows), _retrieval(found)]
    return "\n".join(lines) + "\n"


def _complete(rows: Sequence[Row], tasks: int) -> list[Row]:
    counts = Counter((row["way"], row["setting"], row["seed"]) for row in rows)
    return [row for row in rows if counts[row["way"], row["setting"], row["seed"]] == tasks]


def mean_of(rows: Sequence[Row]) -> float:
    """Tasks count alike, however many rows they have."""
    return fmean(fmean(row["scores"]) for row in rows)


def _by_seed(rows: Sequence[Row], way: str, setting: str) -> dict[int | None, list[Row]]:
    found: dict[int | None, list[Row]] = {}
    for row in rows:
        if (row["way"], row["setting"]) == (way, setting):
            found.setdefault(row["seed"], []).append(row)
    return found


def _gain(rows: Sequence[Row], way: str, setting: str) -> str:
    """Difference to Mixture on the same rows, with its paired standard error; seeds are averaged per row."""
    other = _by_seed(rows, "mixture", setting).get(None)
    if way == "mixture" or not other:
        return ""
    theirs = {row["task"]: row["scores"] for row in other}
    own = _by_seed(rows, way, setting).values()
    differences = []
    for task, scores in theirs.items():
        mine = [row["scores"] for seed in own for row in seed if row["task"] == task]
        for at, score in enumerate(scores):
            differences += [fmean(one[at] for one in mine) - score] if mine else []
    if len(differences) < 2:
        return ""
    error = stdev(differences) / len(differences) ** 0.5
    return f"{fmean(differences):+.3f} +- {error:.3f}"


def _split(rows: Sequence[Row]) -> list[str]:
    """RAMoLE on tasks whose adapter trained the router, and on the others, which it meets for the first time."""
    lines = []
    for trained, title in ((True, "adapters the router was trained with"), (False, "new adapters")):
        mine = [
            r
            for r in rows
            if r["way"] == "ramole" and r["setting"] == "iid" and r["trained"] is trained
        ]
        same = {row["task"]: row for row in _by_seed(rows, "mixture", "iid").get(None, [])}
        if mine and all(row["task"] in same for row in mine):
            uniform = mean_of([same[row["task"]] for row in mine])
            lines.append(f"IID, {title}: RAMoLE {mean_of(mine):.3f}, Mixture {uniform:.3f}")
    return lines


def _attention(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if "entropy" in row]
    if not mine:
        return []
    entropy, own = fmean(r["entropy"] for r in mine), fmean(r["own"] for r in mine)
    return [
        f"IID weights: entropy {entropy:.3f} of uniform, share of the own adapter {own:.3f} (uniform 0.333)"
    ]


def _retrieval(found: Mapping[str, Any]) -> str:
    first, three, number = 0, 0, 0
    for task, sets in found["iid"].items():
        for ids in sets:
            first, three, number = first + (ids[0] == task), three + (task in ids), number + 1
    return f"retrieval, IID: own adapter first {first / number:.3f}, among three {three / number:.3f}, {number} rows"
