"""The pictures of a report: scores, loss curves, routing.

Why matplotlib without a display: reports are written by servers and in tests. Colours are Okabe and
Ito's, and maps are cividis and PuOr: all readable without telling red from green.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loramux.report.routing import Routing

P = ParamSpec("P")
BEFORE, AFTER = "#b3bcc6", "#0072b2"
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#b8a900")
METRIC_NAMES = {
    "token": "Accuracy, ranking per token",
    "raw": "Accuracy, ranking by raw sum",
    "byte": "Accuracy, ranking per byte",
    "exact_match": "Exact match",
    "bleu": "BLEU",
}
CURVES = {"loss": "training", "val_loss": "validation", "aux": "auxiliary"}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#56606b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a name may hold a dollar sign
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with our style and leave the caller's matplotlib settings alone."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def percent(metric: str, value: float) -> float:
    """Every score on a scale of 0 to 100; BLEU has it already."""
    return value if metric == "bleu" else 100.0 * value


def headline(scores: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One score per task: its first metric."""
    first: dict[str, Mapping[str, Any]] = {}
    for score in scores:
        first.setdefault(score["task"], score)
    return list(first.values())


@styled
def score_chart(scores: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars before and after per task, one panel for each kind of score."""
    chosen = headline(scores)
    metrics = list(dict.fromkeys(score["metric"] for score in chosen))
    groups = [[score for score in chosen if score["metric"] == metric] for metric in metrics]
    longest = max(len(score["task"]) for score in chosen)
    step = 1.15 if longest <= 12 else 1.15 + 0.07 * (longest - 12)
    sizes = [max(len(group), 1.6) for group in groups]
    width = min(max(1.6 + step * sum(sizes), 4.5), 16.0)
    figure, axes = figure_of(1, len(groups), (width, 4.2), width_ratios=sizes)
    for axis, metric, group in zip(axes, metrics, groups, strict=True):
        _score_panel(axis, metric, group)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _score_panel(axis: Any, metric: str, group: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(group))
    for offset, when, colour in ((-0.2, "before", BEFORE), (0.2, "after", AFTER)):
        values = [percent(metric, score[when]) for score in group]
        errors = [percent(metric, score.get(f"stderr_{when}") or math.nan) for score in group]
        axis.bar(
            places + offset,
            values,
            0.38,
            color=colour,
            label=when,
            yerr=errors,
            error_kw={"ecolor": "#3b444d", "elinewidth": 1.1, "capsize": 2.5},
        )
        for x, value, error in zip(places + offset, values, errors, strict=True):
            axis.annotate(
                f"{value:.1f}",
                (x, value if math.isnan(error) else value + error),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
            )
    sizes = sorted({score["rows"] for score in group})
    rows = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    axis.set_title(f"{METRIC_NAMES.get(metric, metric)}\n({rows} rows per task)")
    axis.set_xticks(places, [_wrap(score["task"]) for score in group])
    axis.set_xlim(-0.6, len(group) - 0.4)
    top = max(percent(metric, score[w]) for score in group for w in ("before", "after"))
    axis.set_ylim(0, 108 if metric != "bleu" else max(10.0, 1.25 * top))
    axis.set_ylabel("per cent" if metric != "bleu" else "BLEU")
    axis.grid(visible=False, axis="x")


@styled
def loss_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss over the steps; the router's loss in a panel of its own."""
    curves = {name: points for name in CURVES if (points := _series(history, name))}
    panels = 2 if "aux" in curves else 1
    figure, axes = figure_of(1, panels, (7.5 if panels == 1 else 11.0, 4.0))
    steps = max((int(row["step"]) for row in history), default=0)
    axes[0].set_title(f"Loss over {steps} steps")
    axes[0].set_ylabel("loss (nats per token)")
    for i, (name, points) in enumerate(curves.items()):
        _curve(axes[-1 if name == "aux" else 0], name, points, PALETTE[i])
    if panels == 2:
        axes[1].set_title("Loss of the router, as added")
    for axis in axes:
        axis.set_xlabel("optimizer step")
        axis.legend()
    return figure


def _curve(axis: Any, name: str, points: Sequence[tuple[float, float]], colour: str) -> None:
    """Validation as marked points; the others as a pale line with their moving average on top."""
    x, y = np.array(points, dtype=float).T
    label = CURVES[name]
    if name == "val_loss":
        axis.plot(x, y, "o-", color=colour, markersize=5, linewidth=1.6, label=label)
    elif len(x) < 12:
        axis.plot(x, y, color=colour, linewidth=1.8, label=label)
    else:
        window = max(3, len(x) // 15)
        axis.plot(x, y, color=colour, linewidth=0.9, alpha=0.35)
        mean, label = _trailing_mean(y, window), f"{label} (mean of {window})"
        axis.plot(x, mean, color=colour, linewidth=1.9, label=label)


def _trailing_mean(values: Any, window: int) -> Any:
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts)


@styled
def routing_map(routing: Routing, *, difference: bool = False) -> Figure:
    """Which columns each task's prompts are routed to, layer by layer; one panel per task.

    With `difference`, each panel shows the distance from the mean of all tasks instead.
    """
    across = min(len(routing.tasks), 4)
    down = math.ceil(len(routing.tasks) / across)
    width = 1.4 + across * max(1.9, 0.34 * len(routing.columns) + 0.3)
    height = 1.7 + down * (1.2 + 0.13 * len(routing.layers))
    figure, axes = figure_of(down, across, (min(width, 18.0), min(height, 22.0)), sharey=True)
    tables = {t: routing.difference(t) if difference else routing.tables[t] for t in routing.tasks}
    most = max(float(np.nanmax(np.abs(table))) for table in tables.values())
    top = max(most, 0.01) if difference or routing.measure == "weight" else 1.0
    look = {"cmap": "PuOr" if difference else "cividis", "vmin": -top if difference else 0.0}
    for axis, (task, table) in zip(axes, tables.items(), strict=False):
        image = axis.imshow(table, aspect="auto", vmax=top, interpolation="nearest", **look)
        title = f"{_wrap(task)}\n({routing.counts[task]} {routing.unit})"
        axis.set_title(title, fontsize=9.5 if len(task) > 14 else None)
        axis.set_xticks(range(len(routing.columns)), map(short_name, routing.columns))
        axis.tick_params(axis="x", rotation=60 if _is_named(routing) else 0, length=0)
        axis.set_yticks(*_layer_ticks(routing.layers))
        axis.grid(visible=False)
    for axis in axes[len(tables) :]:
        axis.set_visible(False)
    for row in range(down):
        axes[row * across].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label(_measure_text(routing, difference))
    return figure


def _measure_text(routing: Routing, difference: bool) -> str:
    what = (
        f"share of {routing.unit} that select it"
        if routing.measure == "selected"
        else "mean weight of the router"
    )
    return f"{what}, minus the mean of the tasks" if difference else what


@styled
def router_lines(routing: Routing) -> Figure:
    """How sure the router is per layer, and how often each column is used over all layers."""
    wide = max(6.0, 0.16 * len(routing.columns) * (len(routing.tasks) + 1))
    figure, (left, right) = figure_of(1, 2, (min(5.6 + wide, 17.0), 4.2), width_ratios=(5.6, wide))
    width = 0.8 / len(routing.tasks)
    places = np.arange(len(routing.columns))
    for i, task in enumerate(routing.tasks):
        colour = PALETTE[i % len(PALETTE)]
        left.plot(routing.layers, routing.entropy[task], color=colour, lw=1.7, label=task)
        offset = (i - (len(routing.tasks) - 1) / 2) * width
        right.bar(places + offset, 100 * routing.share(task), width, color=colour)
    left.set_title("Entropy of the router by layer")
    left.set_ylabel("entropy (0 decided, 1 undecided)")
    left.set_xlabel("layer")
    left.set_ylim(0, 1.05)
    right.set_title("Use over all layers (dashed: equal use)")
    right.set_ylabel("per cent")
    right.set_xticks(places, map(short_name, routing.columns))
    right.axhline(100 / len(places), color="#3b444d", lw=1.0, ls="--")
    right.grid(visible=False, axis="x")
    if _is_named(routing):
        right.tick_params(axis="x", rotation=25)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(routing.tasks), 5),
    )
    return figure


def short_name(column: str) -> str:
    """`self_attn.q_proj` reads as `q`; experts keep their number."""
    last = column.rsplit(".", 1)[-1]
    return last.removesuffix("_proj")


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; the same figure gives the same bytes."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def figure_of(
    rows: int, columns: int, size: tuple[float, float], **grid: Any
) -> tuple[Figure, Any]:
    """A figure outside pyplot: nothing to close, no display, no state shared with the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **grid).reshape(-1)


def _series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Points of one curve; rows without a finite value for it are left out."""
    points = [(row["step"], row.get(name)) for row in history]
    return [
        (float(step), float(value))
        for step, value in points
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _layer_ticks(layers: Sequence[int]) -> tuple[list[int], list[str]]:
    every = max(1, math.ceil(len(layers) / 12))
    places = list(range(0, len(layers), every))
    return places, [str(layers[place]) for place in places]


def _is_named(routing: Routing) -> bool:
    return not all(column.isdigit() for column in routing.columns)


def _wrap(task: str) -> str:
    """Long task names on two lines, broken at the underscore nearest the middle."""
    if len(task) <= 14 or "_" not in task:
        return task
    breaks = [i for i, letter in enumerate(task) if letter == "_"]
    at = min(breaks, key=lambda i: abs(i - len(task) / 2))
    return f"{task[: at + 1]}\n{task[at + 1 :]}"
