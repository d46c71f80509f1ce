"""Where the ranks are, and how they moved while training.

`train/edits.py` says what a row of edits.json is read for.

Letters: L layers, M linears of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramux.report.charts import Axis, Line, Panel, Scale, heat_maps, line_panels, pick
from loramux.report.page import Missing, Picture, Section, Table, picture
from loramux.report.plots import short_name
from loramux.report.records import JobRecord, place_of
from loramux.train.edits import ranks_of_row, rows_of

MOST_LINES = 7
# Names of linears without `_proj`, in the families' order of execution.
RUN_ORDER = (
    *("q", "k", "v", "qkv", "c_attn", "query", "key", "value", "o", "out", "dense"),
    *("gate", "gate_up", "up", "c_fc", "fc1", "down", "fc2"),
)


def rank_section(job: JobRecord, heading: str = "Ranks") -> Section | Missing:
    """The final ranks, their history, and what each edit did."""
    if job.adapter is None and not rank_history(job.edits):
        return Missing(heading, "the ranks are read from the saved adapter, which is not there yet")
    final = {path: sum(ranks) for path, ranks in job.adapter.ranks.items()} if job.adapter else {}
    history = rank_history(job.edits)
    figures: list[Picture] = []
    text = _says(final, job)
    if history and len({rank for ranks in history.values() for rank in ranks.values()}) > 1:
        figures += [_rounds(history), _budget_lines(history)]
    elif len(set(final.values())) > 1:
        figures.append(_final(final))
    changes = edit_counts(job.edits)
    if changes:
        figures.append(_edited(changes, job.edits))
    records = {
        "ranks": {
            job.name: {
                "final": final,
                "history": [{"step": step, "ranks": ranks} for step, ranks in history.items()],
                "edits": list(job.edits),
            }
        }
    }
    tables = [_edits_table(job.edits)] if job.edits else []
    return Section(heading, text, tables, figures, records)


def _says(final: Mapping[str, int], job: JobRecord) -> str:
    if not final:
        return "The adapter is not saved yet."
    ranks = sorted(set(final.values()))
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    text = f"{len(final)} linears with {spread}, {sum(final.values()):,} rank rows in all"
    most = max(len(r) for r in job.adapter.ranks.values()) if job.adapter else 1
    text += f", those of {most} experts added up." if most > 1 else "."
    for row in job.edits:
        if row.get("what") == "restore":
            best = row.get("best_step")
            text += f" The weights of step {best}, the best validation, were kept: later edits are undone."
    return text if job.edits else text + " The method edits no ranks while it trains."


def rank_history(edits: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """step -> rank of every site after it, from rows with `ranks`; step 0 is what the first edits started from."""
    found: dict[int, dict[str, int]] = {}
    for row in edits:
        if ranks := ranks_of_row(row):
            found[int(row.get("step", 0))] = ranks
    if not found or 0 in found:
        return found
    first = min(found)
    start = next(dict(ranks_of_row(row)) for row in edits if ranks_of_row(row))
    for row in edits:
        sign = {"prune": 1, "add": -1}.get(str(row.get("what")), 0)
        if sign and row.get("step") == first and row.get("site") in start:
            start[str(row["site"])] += sign * rows_of(row)
    return {0: start, **found}


def edit_counts(edits: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """what -> site -> rank rows concerned, over all steps."""
    found: dict[str, dict[str, int]] = {}
    for row in edits:
        site, number = row.get("site"), rows_of(row)
        if isinstance(site, str) and site and number:
            sites = found.setdefault(str(row.get("what", "edit")), {})
            sites[site] = sites.get(site, 0) + number
    return found


def grid(values: Mapping[str, float]) -> tuple[Any, list[int], list[str]]:
    """[L, M] with NaN where a layer lacks the linear, the layers, and the linears in the order they are met."""
    places = {path: place_of(path) for path in values}
    layers = sorted({layer for layer, _ in places.values()})
    names = in_order([name for _, name in places.values()])
    table = np.full((len(layers), len(names)), np.nan)
    for path, value in values.items():
        layer, name = places[path]
        table[layers.index(layer), names.index(name)] = value
    return table, layers, names


def in_order(names: Sequence[str]) -> list[str]:
    """Linears in the order a layer runs them, as far as their names are known; others behind, as they come."""
    met = list(dict.fromkeys(names))

    def place(name: str) -> tuple[int, int]:
        known = short_name(name)
        return (RUN_ORDER.index(known) if known in RUN_ORDER else len(RUN_ORDER), met.index(name))

    return sorted(met, key=place)


def site_maps(panels: Sequence[tuple[str, Mapping[str, float]]], scale: Scale) -> Any:
    every = {path: 0.0 for _, values in panels for path in values}
    _, layers, names = grid(every)
    tables = [
        (title, grid({path: values.get(path, np.nan) for path in every})[0])
        for title, values in panels
    ]
    rows = Axis([str(layer) for layer in layers], "layer")
    columns = Axis([short_name(name) for name in names], slanted=True)
    return heat_maps(tables, rows, columns, scale, across=3 if len(tables) in (3, 5, 6) else 4)


def site_table(values: Mapping[str, Any], columns: Sequence[str]) -> Table:
    """A row per layer, a column per linear."""
    table, layers, names = grid({path: float(value) for path, value in values.items()})
    whole = all(float(value).is_integer() for value in values.values())
    rows = [
        [layer, *(None if np.isnan(v) else int(v) if whole else float(v) for v in row)]
        for layer, row in zip(layers, table, strict=True)
    ]
    return Table((*columns, *map(short_name, names)), rows)


def _final(final: Mapping[str, int]) -> Picture:
    figure = site_maps([("", final)], Scale("rank", number=".0f"))
    return picture(
        figure,
        extremes("Heat map of ranks", final),
        "Rank of every linear.",
        site_table(final, ("layer",)),
    )


def _rounds(history: Mapping[int, Mapping[str, int]]) -> Picture:
    steps = list(history)
    shown = [steps[i] for i in pick(len(steps))]
    panels = [("start" if step == 0 else f"after step {step}", history[step]) for step in shown]
    figure = site_maps(panels, Scale("rank", number=".0f"))
    alt = f"{len(shown)} heat maps of ranks over training. At the end: {extremes('ranks', history[steps[-1]])}"
    caption = "Rank of every linear as training went on."
    if len(shown) < len(steps):
        caption += f" {len(shown)} of {len(steps)} rounds, evenly spread."
    return picture(figure, alt, caption, site_table(history[steps[-1]], ("layer",)))


def _budget_lines(history: Mapping[int, Mapping[str, int]]) -> Picture:
    """The ranks of each kind of linear, added up over the layers."""
    names = in_order([place_of(path)[1] for ranks in history.values() for path in ranks])
    totals = {
        name: [
            sum(rank for path, rank in ranks.items() if place_of(path)[1] == name)
            for ranks in history.values()
        ]
        for name in names
    }
    steps = list(history)
    drawn = sorted(names, key=lambda name: -max(totals[name]))[:MOST_LINES]
    lines = [
        Line(short_name(name), steps, totals[name], marked=len(steps) < 20)
        for name in names
        if name in drawn
    ]
    panel = Panel("Ranks by kind of linear", lines, "optimizer step", "ranks, all layers")
    alt = "; ".join(
        f"{short_name(name)} from {totals[name][0]} to {totals[name][-1]}" for name in drawn
    )
    table = Table(
        ("step", *map(short_name, names)),
        [[s, *(totals[n][i] for n in names)] for i, s in enumerate(steps)],
    )
    return picture(
        line_panels([panel]),
        f"Ranks by kind of linear: {alt}.",
        "The same, added up over the layers.",
        table,
    )


def _edited(
    changes: Mapping[str, Mapping[str, int]], edits: Sequence[Mapping[str, Any]]
) -> Picture:
    kinds = sorted(changes, key=lambda what: -sum(changes[what].values()))[:4]
    figure = site_maps([(what, changes[what]) for what in kinds], Scale("rank rows", number=".0f"))
    counts = ", ".join(f"{what} {sum(changes[what].values())}" for what in kinds)
    steps = len({row.get("step") for row in edits})
    alt = f"Heat maps of how many rank rows were edited: {counts}, at {steps} steps."
    table = Table(
        ("linear", *kinds),
        [
            [site, *(changes[w].get(site, 0) for w in kinds)]
            for site in dict.fromkeys(s for w in kinds for s in changes[w])
        ],
    )
    return picture(figure, alt, f"Rank rows that the edits of {steps} steps concerned.", table)


def _edits_table(edits: Sequence[Mapping[str, Any]]) -> Table:
    """One row per step and kind of edit."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in edits:
        found.setdefault((int(row.get("step", 0)), str(row.get("what", "edit"))), []).append(row)
    rows = []
    for (step, what), entries in found.items():
        sites = {entry.get("site") for entry in entries if entry.get("site")}
        number = sum(rows_of(entry) for entry in entries)
        rows.append([step, what, len(sites), number or None])
    return Table(("step", "edit", "linears", "rank rows"), rows, "Edits of ranks while training")


def extremes(what: str, values: Mapping[str, float]) -> str:
    low, high = min(values, key=lambda k: values[k]), max(values, key=lambda k: values[k])
    return f"{what}: {len(values)} linears, lowest {values[low]:.4g} at {low}, highest {values[high]:.4g} at {high}."
