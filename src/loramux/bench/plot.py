"""The ratios as a picture: median and interval of every row, its target, and the spread of the controls."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

from loramux.bench.pictures import PICTURES
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


TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20)


def save_chart(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write a PNG of what `bench` returned: its rows, and what they cannot show below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count, below, draw = PICTURES.get(result["bench"], (0, 0.0, None))
    above = 1.6 + 0.42 * len(result["rows"])
    with rc_context(STYLE):
        figure = Figure(figsize=(11, above + below), layout="constrained")
        if draw is None:
            _rows(figure, result)
        else:
            halves: Any = figure.subfigures(2, 1, height_ratios=(above, below))
            top, bottom = halves
            _rows(top, result)
            draw(list(bottom.subplots(1, count, squeeze=False)[0]), result)
        figure.savefig(path, dpi=130)
    return Path(path)


def _rows(figure: Any, result: Mapping[str, Any]) -> None:
    rows = result["rows"]
    axes = figure.subplots()
    _controls(axes, rows)
    seen: set[str] = set()
    for at, row in enumerate(rows):
        _one(axes, at, row, seen)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    shown = [row[key] for row in rows for key in ("low", "high")] + [0.9, 1.2]
    low, high = 0.9 * min(shown), 1.15 * max(shown)
    axes.set_xlim(low, high)
    inside = _apart([tick for tick in TICKS if low <= tick <= high], low, high)
    axes.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axes.minorticks_off()
    axes.set_xlabel(
        "variant / reference, median of paired rounds and 95 % interval; | is the target"
    )
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=9, fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _apart(ticks: list[float], low: float, high: float, least: float = 0.06) -> list[float]:
    """Ticks whose labels do not touch on a log axis; 1 always stays."""
    width = log(high / low)
    kept = [1.0]
    for tick in ticks:
        if all(abs(log(tick / other)) / width >= least for other in kept):
            kept.append(tick)
    return sorted(kept)


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
    is_plain = row["resolved"] or said in ("control", "quick")
    text = f"{row['ratio']:.3f}" + ("" if is_plain else "  not resolved")
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
    quick = "QUICK RUN, NOT A MEASUREMENT\n" if result["quick"] else ""
    machine = result["machine"]
    return f"{quick}{result['base']}, {machine['cpu']}, {machine['threads']} thread, {result['rounds']} rounds"
