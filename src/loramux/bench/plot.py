"""The ratios as a picture: median and interval of every row, its target, and the spread of the controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramux.report.plots import STYLE

COLOURS = {
    "met": "#009e73",
    "missed": "#d55e00",
    "open": "#e69f00",
    "control": "#7f7f7f",
    "quick": "#56b4e9",
    "": "#0072b2",
}
MEANING = {
    "met": "target met",
    "missed": "target missed",
    "open": "not settled",
    "control": "control",
    "quick": "quick run, not a measurement",
    "": "no target",
}


def save_chart(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write a PNG of what `bench` returned."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = result["rows"]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        _controls(axes, rows)
        seen: set[str] = set()
        for at, row in enumerate(rows):
            _one(axes, at, row, seen)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        ticks = [0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5]
        shown = [row[key] for row in rows for key in ("low", "high")] + [0.9, 1.2]
        axes.set_xlim(0.9 * min(shown), 1.15 * max(shown))
        inside = [t for t in ticks if 0.9 * min(shown) <= t <= 1.15 * max(shown)]
        axes.set_xticks(inside, [f"{t:g}" for t in inside])
        axes.minorticks_off()
        axes.set_xlabel(
            "variant / reference, median of paired rounds and 95 % interval; | is the target"
        )
        axes.set_title(_title(result), loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
        figure.savefig(path, dpi=130)
    return Path(path)


def _one(axes: Any, at: int, row: Mapping[str, Any], seen: set[str]) -> None:
    said = row["verdict"]
    axes.errorbar(
        row["ratio"],
        at,
        xerr=[[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]],
        fmt="o",
        markersize=5,
        capsize=3,
        color=COLOURS[said],
        label=None if said in seen else MEANING[said],
    )
    seen.add(said)
    if row["target"] is not None:
        axes.plot([row["target"]] * 2, [at - 0.35, at + 0.35], color="#20262c", linewidth=1.5)
    text = f"{row['ratio']:.3f}" + (
        "" if row["resolved"] or said == "control" else "  not resolved"
    )
    axes.annotate(
        text, (row["high"], at), (6, 0), textcoords="offset points", va="center", fontsize=8
    )


def _controls(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    edges = [row[key] for row in rows if row["verdict"] == "control" for key in ("low", "high")]
    if edges:
        axes.axvspan(min(edges), max(edges), color="#e3e7eb", zorder=0)
    axes.axvline(1.0, color="#7f7f7f", linewidth=0.8)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['what']}, batch {row['batch']}: {row['variant']}\n/ {row['reference']}"


def _title(result: Mapping[str, Any]) -> str:
    quick = "QUICK RUN, NOT A MEASUREMENT: " if result["quick"] else ""
    machine = result["machine"]
    return f"{quick}{result['base']}, {machine['cpu']}, {machine['threads']} thread, {result['rounds']} rounds"
