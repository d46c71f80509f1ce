"""What went into a merged adapter, how alike its inputs were, and what the merge lost (`compose.json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramux.report.charts import Axis, Line, Panel, Scale, heat_maps, line_panels
from loramux.report.page import Missing, Picture, Section, Table, picture
from loramux.report.ranks import extremes, site_maps, site_table
from loramux.report.records import place_of


def merge_section(provenance: Mapping[str, Any]) -> Section | Missing | None:
    """The inputs with their weights, their similarity, and error and rank of every linear."""
    if not provenance:
        return None
    figures = []
    alike = provenance.get("similarity")
    if isinstance(alike, Mapping) and alike.get("overall"):
        figures.append(_similarity(alike))
        if len(alike["names"]) == 2 and alike.get("by_site"):
            figures.append(_similarity_by_site(alike))
    figures += _errors(provenance)
    search = provenance.get("search")
    if isinstance(search, Mapping) and isinstance(search.get("evaluations"), list):
        figures += _search(search["evaluations"])
    title = provenance.get("title") or provenance.get("method", "unknown method")
    text = (
        f"Made by {title}" + (f" ({provenance['paper']})" if provenance.get("paper") else "") + "."
    )
    return Section("Merge", text, _tables(provenance), figures, {"merge": dict(provenance)})


def _tables(provenance: Mapping[str, Any]) -> list[Table]:
    inputs = [entry for entry in provenance.get("inputs", []) if isinstance(entry, Mapping)]
    weights = list(provenance.get("weights", [])) or [None] * len(inputs)
    rows = []
    for entry, weight in zip(inputs, weights, strict=False):
        rank = entry.get("rank")
        said = (
            f"{rank['min']} to {rank['max']}"
            if isinstance(rank, Mapping) and rank.get("min") != rank.get("max")
            else None
        )
        low = rank.get("min") if isinstance(rank, Mapping) else rank
        rows.append(
            [
                entry.get("name"),
                weight,
                said or low,
                entry.get("sites"),
                str(entry.get("digest", ""))[:12],
            ]
        )
    tables = (
        [Table(("adapter", "weight", "rank", "linears", "digest"), rows, "What went in")]
        if rows
        else []
    )
    facts = []
    for name in ("lambda", "seed", "options", "rank", "error", "distance", "seconds"):
        value = provenance.get(name)
        if isinstance(value, Mapping):
            facts += [
                [f"{name}, {key}", entry if isinstance(entry, int | float) else str(entry)]
                for key, entry in value.items()
            ]
        elif value is not None:
            facts.append([name, value])
    return [*tables, Table(("", "value"), facts, "How")] if facts else tables


def _similarity(alike: Mapping[str, Any]) -> Picture:
    names = [str(name) for name in alike["names"]]
    table = np.array(alike["overall"], dtype=float)
    figure = heat_maps(
        [("", table)],
        Axis(names),
        Axis(names, slanted=True),
        Scale("cosine of the products", low=min(0.0, float(table.min())), high=1.0, number=".2f"),
    )
    pairs = [(table[i, j], names[i], names[j]) for i in range(len(names)) for j in range(i)]
    alt = f"Similarity of {len(names)} adapters."
    if pairs:
        low, high = min(pairs), max(pairs)
        alt += f" Most alike {high[1]} and {high[2]} ({high[0]:.3f}), least {low[1]} and {low[2]} ({low[0]:.3f})."
    rows = [
        [name, *(round(float(v), 4) for v in row)] for name, row in zip(names, table, strict=True)
    ]
    caption = "Cosine between the adapters' changes of the weights, all linears: 1 the same direction, 0 unrelated."
    return picture(figure, alt, caption, Table(("adapter", *names), rows))


def _similarity_by_site(alike: Mapping[str, Any]) -> Picture:
    values = {str(path): float(matrix[0][1]) for path, matrix in alike["by_site"].items()}
    scale = Scale("cosine", low=min(0.0, *values.values()), high=1.0, number=".2f")
    figure = site_maps([("", values)], scale)
    return picture(
        figure,
        extremes("Similarity by linear", values),
        "The same, linear by linear.",
        site_table(values, ("layer",)),
    )


def _errors(provenance: Mapping[str, Any]) -> list[Picture]:
    """Error and distance by linear, where the merge has any."""
    sites = [row for row in provenance.get("sites", []) if isinstance(row, Mapping)]
    figures = []
    said = {
        "error": "What the kept rank leaves out, relative to the merged change (0: nothing).",
        "distance": "How far the result is from the plain weighted sum, relative to it (0: it is the sum).",
    }
    for key, caption in said.items():
        values = {
            str(row["site"]): float(row[key])
            for row in sites
            if isinstance(row.get(key), int | float)
        }
        if not values or max(values.values()) < 1e-6:
            continue
        figure = site_maps([("", values)], Scale(key, number=".2f"))
        figures.append(
            picture(
                figure,
                extremes(f"Heat map of the {key}", values),
                caption,
                site_table(values, ("layer",)),
            )
        )
    ranks = {
        str(row["site"]): float(row["rank"]) for row in sites if isinstance(row.get("rank"), int)
    }
    if len(set(ranks.values())) > 1 and all(place_of(path)[0] >= 0 for path in ranks):
        figure = site_maps([("", ranks)], Scale("rank", number=".0f"))
        figures.append(
            picture(
                figure,
                extremes("Heat map of ranks", ranks),
                "Rank that was kept.",
                site_table(ranks, ("layer",)),
            )
        )
    return figures


def _search(evaluations: Sequence[Any]) -> list[Picture]:
    """The objective of each trial, where the merge searched for its weights."""
    values = [float(value) for value in evaluations if isinstance(value, int | float)]
    if not values:
        return []
    best = np.minimum.accumulate(values).tolist()
    steps = list(range(1, len(values) + 1))
    panel = Panel(
        "Search for the weights",
        [Line("tried", steps, values), Line("best so far", steps, best)],
        "trial",
        "objective",
        floor=None,
    )
    alt = f"Objective over {len(values)} trials, from {values[0]:.4g}; best {min(values):.4g}."
    return [picture(line_panels([panel]), alt, "The objective of each trial.")]
