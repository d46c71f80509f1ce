"""The results as a picture: every method's mean with its seeds, its difference to the reference, and its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux.compare.tables import TITLES
from loramux.report.plots import STYLE

COLOURS = {"above": "#009e73", "below": "#d55e00", "not separated": "#7f7f7f", "": "#0072b2"}
FORMATS = (".png", ".svg")
Entries = Sequence[Mapping[str, Any]]


def save_plots(result: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write stem.png and stem.svg: a line of three pictures per part."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts = {name: part for name, part in result["parts"].items() if _measured(part)}
    heights = [1.3 + 0.32 * len(_measured(part)) for part in parts.values()]
    with rc_context({**STYLE, "svg.hashsalt": "loramux"}):
        figure = Figure(figsize=(13, max(sum(heights), 2.0)), layout="constrained")
        grid: Any = figure.subplots(len(parts), 3, squeeze=False, height_ratios=heights)
        for line, (name, part) in zip(grid, parts.items(), strict=True):
            entries = _measured(part)
            _means(line[0], entries, TITLES[name])
            _differences(line[1], entries, part["reference"])
            _prices(line[2], entries)
        paths = [stem.with_suffix(suffix) for suffix in FORMATS]
        for path in paths:
            figure.savefig(path, dpi=130)
    return paths


def _measured(part: Mapping[str, Any]) -> Entries:
    return [entry for entry in part["methods"] if entry["mean"] is not None]


def _means(axes: Any, entries: Entries, title: str) -> None:
    """The mean, the standard error over test rows as a bar, and every seed as a point."""
    for at, entry in enumerate(entries):
        axes.errorbar(
            entry["mean"], at, xerr=entry["row_error"], fmt="o", color=_colour(entry), capsize=3
        )
        axes.plot(entry["by_seed"], [at + 0.22] * len(entry["by_seed"]), "k.", markersize=4)
    axes.set_yticks(range(len(entries)), [entry["method"] for entry in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlabel("accuracy, mean over tasks; dots are seeds")
    axes.set_title(title, loc="left")


def _differences(axes: Any, entries: Entries, reference: str) -> None:
    axes.axvline(0, color="0.3", linewidth=1)
    for at, entry in enumerate(entries):
        found = entry["difference"]
        if found is None:
            continue
        below, above = found["value"] - found["low"], found["high"] - found["value"]
        axes.errorbar(
            found["value"],
            at,
            xerr=[[max(below, 0)], [max(above, 0)]],
            fmt="o",
            color=_colour(entry),
            capsize=3,
        )
    axes.set_yticks(range(len(entries)), [])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlabel(
        f"minus {reference}, 95 % interval over test rows\ngreen above, red below, grey not separated"
    )


def _prices(axes: Any, entries: Entries) -> None:
    """Decode step over that of the bare base, where it was measured."""
    priced = [(at, entry) for at, entry in enumerate(entries) if entry["decode"] is not None]
    for at, entry in priced:
        axes.barh(at, entry["decode"]["value"] - 1, left=1, color=_colour(entry), height=0.5)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(entries)), [])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlabel("decode step / bare base, CPU time")


def _colour(entry: Mapping[str, Any]) -> str:
    return COLOURS[entry["difference"]["says"] if entry["difference"] else ""]
