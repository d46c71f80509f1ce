"""A comparison folder: the results of `loramux compare` (results.json, rows.jsonl) as tables and a picture per part.

Why shapes beside colours: what a method's interval says about its difference (above, below, not separated) must
survive a grey print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramux.report.charts import short
from loramux.report.page import Missing, Picture, Section, Table, picture
from loramux.report.plots import figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Entry = Mapping[str, Any]
LOOKS = {
    "above": ("^", "#0072b2"),
    "below": ("v", "#d55e00"),
    "not separated": ("o", "#5a6570"),
    "": ("s", "#1d2329"),
}
PARTS = {
    "multi": "All tasks mixed, one adapter",
    "single": "One adapter per task",
    "fusion": "Trained adapters put together",
}


def comparison_sections(
    rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> list[Section | Missing]:
    """A section per part, then what was matched and what failed; rows alone where there is no result yet."""
    if not result.get("parts"):
        how = "`loramux compare SUITE.yaml --out DIR` writes results.json; the same command goes on"
        return [_rows_section(rows), Missing("Means, intervals and costs", how)]
    parts: list[Section | Missing] = []
    for name, part in result["parts"].items():
        parts.append(_part_section(PARTS.get(name, str(name)), part))
    parts.append(_about(result))
    for label, why in dict(result.get("absent") or {}).items():
        parts.append(Missing(str(label), str(why)))
    for failed in result.get("failed") or ():
        parts.append(Missing(f"Row {failed.get('row')}", f"failed: {failed.get('reason')}"))
    return parts


def _rows_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    keys = [
        key
        for key in ("part", "method", "task", "seed", "status", "reason")
        if any(key in r for r in rows)
    ]
    table = Table(keys, [[row.get(key) for key in keys] for row in rows])
    return Section(
        "Rows",
        f"{len(rows)} rows are finished.",
        [table],
        records={"rows": [{key: row.get(key) for key in keys} for row in rows]},
    )


def _part_section(title: str, part: Mapping[str, Any]) -> Section | Missing:
    entries = [entry for entry in part["methods"] if entry.get("mean") is not None]
    if not entries:
        return Missing(title, "no method has answered all tasks of this part yet")
    tasks = list(part.get("tasks", ()))
    reference = str(part.get("reference"))
    columns = (
        "method",
        "mean",
        "± seeds",
        "± rows",
        "seeds",
        f"minus {reference}",
        "low",
        "high",
        "says",
        *tasks,
    )
    costs = ("method", "trained", "active", "saved", "train s", "peak MB", "decode", "serves")
    text = (
        "Accuracy, the mean over tasks of each task's mean. ± seeds: standard deviation over seeds; ± rows: standard "
        f"error over test rows; differences against {reference} are paired over test rows and seeds, with the 95 per "
        "cent interval of a bootstrap over test rows."
    )
    tables = [
        Table(columns, [_scores(entry, tasks) for entry in entries], "Scores"),
        Table(
            costs,
            [_costs(entry) for entry in entries],
            "Costs; decode: CPU time of a step over that of the bare base",
        ),
    ]
    return Section(
        title, text, tables, [_picture(entries, reference)], {f"comparison: {title}": dict(part)}
    )


def _scores(entry: Entry, tasks: Sequence[str]) -> list[Any]:
    found = entry.get("difference") or {}
    each = [(entry.get("tasks", {}).get(task) or {}).get("mean") for task in tasks]
    return [
        entry["method"],
        entry["mean"],
        entry.get("spread"),
        entry.get("row_error"),
        len(entry.get("seeds") or ()),
        found.get("value"),
        found.get("low"),
        found.get("high"),
        found.get("says", ""),
        *each,
    ]


def _costs(entry: Entry) -> list[Any]:
    decode = entry.get("decode") or {}
    return [
        entry["method"],
        _whole(entry.get("trainable_at_end")),
        _whole(entry.get("active")),
        _whole(entry.get("parameters")),
        entry.get("train_seconds"),
        entry.get("peak_mb"),
        decode.get("value"),
        entry.get("servability") or "",
    ]


def _whole(value: Any) -> int | None:
    return None if value is None else round(value)


def _picture(entries: Sequence[Entry], reference: str) -> Picture:
    best = max(entries, key=lambda entry: float(entry["mean"]))
    said = [f"{e['method']} {e['mean']:.3f}" for e in entries]
    alt = f"Means of {len(entries)} methods: {', '.join(said)}. Highest: {best['method']}."
    caption = (
        "Left: mean with its standard error over test rows, and every seed as a dot. Middle: difference to "
        f"{reference} with its 95 per cent interval; triangles up and down are separated from 0, circles are not. "
        "Right: time of a decode step, 1 is the bare base."
    )
    return picture(_draw(entries, reference), alt, caption)


@styled
def _draw(entries: Sequence[Entry], reference: str) -> Figure:
    height = min(1.3 + 0.34 * len(entries), 24.0)
    figure, (means, differences, prices) = figure_of(
        1, 3, (12.5, max(height, 2.4)), sharey=True, width_ratios=(4, 4, 3)
    )
    for at, entry in enumerate(entries):
        found = entry.get("difference")
        marker, colour = LOOKS[found["says"] if found else ""]
        look = {"fmt": marker, "color": colour, "capsize": 3, "ms": 6}
        means.errorbar(entry["mean"], at, xerr=entry.get("row_error"), **look)
        seeds = entry.get("by_seed") or ()
        means.plot(seeds, [at + 0.24] * len(seeds), "k.", ms=4)
        if found:
            reach = [
                [max(found["value"] - found["low"], 0)],
                [max(found["high"] - found["value"], 0)],
            ]
            differences.errorbar(found["value"], at, xerr=reach, **look)
        decode = entry.get("decode")
        if decode:
            prices.barh(at, decode["value"] - 1, left=1, height=0.5, color=colour)
    differences.axvline(0, color="#3b444d", lw=1)
    prices.axvline(1, color="#3b444d", lw=1)
    means.set_yticks(range(len(entries)), [short(str(entry["method"]), 24) for entry in entries])
    means.set_ylim(len(entries) - 0.4, -0.6)
    for axis, title in (
        (means, "Mean accuracy"),
        (differences, short(f"Minus {reference}", 28)),
        (prices, "Decode step"),
    ):
        axis.set_title(title)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=6)
    return figure


def _about(result: Mapping[str, Any]) -> Section:
    counts = result.get("rows") or {}
    matched = [
        [
            label,
            found.get("parameters"),
            round(100 * float(found.get("deviation") or 0.0), 2),
            str(found.get("how", "")),
            str(found.get("note") or ""),
        ]
        for label, found in dict(result.get("matched") or {}).items()
    ]
    text = f"Suite {result.get('suite')} on {result.get('base')}, scored by {result.get('metric')}."
    if counts:
        text += (
            f" {counts.get('done')} of {counts.get('planned')} rows, {counts.get('failed')} failed."
        )
    if isinstance(result.get("budget"), int):
        text += f" Budget: {result['budget']:,} trainable parameters."
    columns = ("method", "trainable", "off the budget, per cent", "how", "note")
    records = {
        key: result.get(key) for key in ("suite", "base", "metric", "budget", "rows", "matched")
    }
    return Section(
        "What was compared",
        text,
        [Table(columns, matched)] if matched else (),
        records={"suite": records},
    )
