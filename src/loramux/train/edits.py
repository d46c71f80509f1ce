"""Reads what controllers say they did (rows of `edits.json`), for logs and reports.

Of a row, beside `step`, `what` and `site`, are read; it may hold more:

    ranks        {site: rank} of all sites after the step
    importance   {site: score} of all sites, on rows without a site
    scores       [R], one per rank row of the site
    pruned       the rank rows of the site that the edit concerned, a list or their number; a row with a site and
                 neither of them, of the kinds `prune` and `add`, concerns one
    best_step    on the last row, of kind `restore`: the weights of this step were kept, later edits undone

Letters: R rank rows of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
ONE_EACH = ("prune", "add")


def rows_of(row: Row) -> int:
    """How many rank rows an edit concerned."""
    value = row.get("pruned")
    if isinstance(value, list):
        return len(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(row.get("what") in ONE_EACH and bool(row.get("site")))


def ranks_of_row(row: Row) -> dict[str, int]:
    """site -> rank after the step; {} for a row that does not say."""
    ranks = row.get("ranks")
    if not isinstance(ranks, Mapping):
        return {}
    return {str(path): sum(r) if isinstance(r, list) else int(r) for path, r in ranks.items()}


def importance_of_row(row: Row) -> dict[str, float]:
    """site -> score of the module; {} for a row that does not say."""
    return numbers(row.get("importance"))


def scores_of_row(row: Row) -> list[float]:
    """The score of each rank row of the row's site; [] for a row that does not say."""
    values = row.get("scores")
    if not isinstance(values, list) or not isinstance(row.get("site"), str) or not row["site"]:
        return []
    return [float(value) for value in values]


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers; {} for anything else."""
    if not isinstance(values, Mapping):
        return {}
    return {
        str(key): float(value) for key, value in values.items() if isinstance(value, int | float)
    }


def edit_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """One step's edits as curves: `edits/WHAT` (rank rows concerned), `rank/SITE`, `importance/SITE`, `score/SITE/...`.

    Of the scores of a site's rank rows the lowest, the highest and the mean are kept.
    """
    found: dict[str, float] = {}
    for row in rows:
        if concerned := rows_of(row):
            name = f"edits/{row.get('what', 'edit')}"
            found[name] = found.get(name, 0.0) + concerned
        found |= {f"rank/{path}": float(rank) for path, rank in ranks_of_row(row).items()}
        found |= {f"importance/{path}": value for path, value in importance_of_row(row).items()}
        if scores := scores_of_row(row):
            where = f"score/{row['site']}"
            found[f"{where}/lowest"], found[f"{where}/highest"] = min(scores), max(scores)
            found[f"{where}/mean"] = sum(scores) / len(scores)
    return found
