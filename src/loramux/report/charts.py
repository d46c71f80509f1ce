"""The two kinds of picture that reports of runs are made of: heat maps and lines, for any number of rows and columns.

Why one drawing function for all maps: ranks, shares, gates and similarities differ in their numbers only, and each has
to stay readable with 2 cells and with 12,000. Colours run from dark to light (cividis), so a grey print says the same;
cells without a value are hatched, cells that are exactly 0 can be crossed.

Letters: L rows of a map, C its columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loramux.report.plots import PALETTE, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MOST_NUMBERS = 140  # cells per panel that still get their number written in
MOST_CROSSES = 2500
MOST_PANELS = 6
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKERS = "os^Dv<>"
SIGNS = "␣…–"  # beyond the Latin letters, what the font is known to have


@dataclass(frozen=True)
class Axis:
    """What stands along one side of a map."""

    labels: Sequence[str]
    name: str = ""
    slanted: bool = False


@dataclass(frozen=True)
class Scale:
    """How numbers become colours; `number` formats those written into cells: "" writes none, "auto" three digits."""

    name: str
    low: float | None = 0.0
    high: float | None = None
    number: str = ""
    crosses: bool = False  # mark cells that are exactly 0


@styled
def heat_maps(
    panels: Sequence[tuple[str, NDArray[np.float64]]],
    rows: Axis | Sequence[Axis],
    columns: Axis,
    scale: Scale,
    *,
    across: int = 4,
) -> Figure:
    """Maps [L, C] side by side under one colour scale; `rows` may differ from panel to panel."""
    by_panel = [rows] * len(panels) if isinstance(rows, Axis) else list(rows)
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    tall = max(table.shape[0] for _, table in panels)
    figure, axes = figure_of(
        down,
        across,
        _size(panels, by_panel, columns, scale, across, down),
        sharey=isinstance(rows, Axis),
    )
    low, high = _limits([table for _, table in panels], scale)
    for axis, (title, table), own in zip(axes, panels, by_panel, strict=False):
        image = axis.imshow(
            np.ma.masked_invalid(table),
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=low,
            vmax=high,
            zorder=1,
        )
        _holes(axis, table)
        if scale.crosses:
            _crosses(axis, table)
        if scale.number and table.size <= MOST_NUMBERS:
            _numbers(axis, table, scale, (low, high))
        if title:
            axis.set_title(short(title, 34), fontsize=10)
        _ticks(axis, columns, own, tall, 64 if across == 1 else 26)
        axis.grid(visible=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for start in range(0, len(panels), across):
        axes[start].set_ylabel(by_panel[start].name)
    share = min(0.9, 3.4 / figure.get_figheight())
    bar = figure.colorbar(
        image, ax=list(axes), shrink=share, pad=0.015, aspect=22, anchor=(0.0, 1.0)
    )
    bar.outline.set_visible(False)
    bar.set_label(scale.name)
    return figure


def _size(
    panels: Sequence[tuple[str, NDArray[np.float64]]],
    rows: Sequence[Axis],
    columns: Axis,
    scale: Scale,
    across: int,
    down: int,
) -> tuple[float, float]:
    tall = max(table.shape[0] for _, table in panels)
    wide = max(table.shape[1] for _, table in panels)
    written = bool(scale.number) and tall * wide <= MOST_NUMBERS
    cell = 0.52 if written else 0.36 if columns.slanted else 0.28
    side = 0.085 * max((min(len(label), 26) for own in rows for label in own.labels), default=2)
    panel = min(max(cell * wide, 1.7), 15.5 / across - 0.2)
    height = min(max((0.3 if tall <= 30 else 0.16) * tall, 1.0), 11.0)
    under = 0.55 + (0.06 * max(map(len, columns.labels), default=0) if columns.slanted else 0.0)
    width = side + 1.7 + across * (panel + 0.25)
    return min(max(width, 5.0), 18.0), min(0.5 + down * (height + min(under, 1.7) + 0.3), 24.0)


def _limits(tables: Sequence[NDArray[np.float64]], scale: Scale) -> tuple[float, float]:
    values = np.concatenate([table[np.isfinite(table)] for table in tables] or [np.zeros(1)])
    least, most = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    low = least if scale.low is None else min(scale.low, least)
    high = most if scale.high is None else scale.high
    return low, high if high > low else low + 1.0


def _holes(axis: Any, table: NDArray[np.float64]) -> None:
    from matplotlib.patches import Rectangle

    if not np.isnan(table).any():
        return
    height, width = table.shape
    axis.add_patch(
        Rectangle(
            (-0.5, -0.5),
            width,
            height,
            facecolor="#f1f3f5",
            edgecolor="#aab3bc",
            hatch="////",
            lw=0.0,
            zorder=0.5,
        )
    )


def _crosses(axis: Any, table: NDArray[np.float64]) -> None:
    y, x = np.nonzero(table == 0.0)
    if 0 < len(x) <= MOST_CROSSES:
        size = 26 if table.size < 800 else 7
        axis.scatter(
            x, y, marker="x", s=size, c="#ffffff", linewidths=0.9 if size > 10 else 0.5, zorder=2
        )


def _numbers(
    axis: Any, table: NDArray[np.float64], scale: Scale, limits: tuple[float, float]
) -> None:
    low, high = limits
    form = _three_digits(limits) if scale.number == "auto" else scale.number
    for (y, x), value in np.ndenumerate(table):
        if np.isnan(value) or (scale.crosses and value == 0):
            continue
        dark = (value - low) / (high - low) < 0.55
        text = format(value, form)
        axis.text(
            x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )


def _three_digits(limits: tuple[float, float]) -> str:
    """A format with three digits for the largest number, the same for all cells."""
    most = max(abs(limits[0]), abs(limits[1]), 1e-12)
    return f".{min(max(0, 2 - math.floor(math.log10(most))), 6)}f"


def _ticks(axis: Any, columns: Axis, rows: Axis, tall: int, most_slanted: int) -> None:
    width = len(columns.labels)
    most = most_slanted if columns.slanted else 16
    at = _spread(width, most if width > most else width)
    axis.set_xticks(at, [short(columns.labels[i], 22) for i in at])
    axis.tick_params(axis="x", length=0)
    if columns.slanted:
        for label in axis.get_xticklabels():
            label.set(rotation=55, ha="right", rotation_mode="anchor")
    if columns.name:
        axis.set_xlabel(columns.name)
    own = len(rows.labels)
    at = _spread(own, own if own <= 32 and tall <= 32 else 16)
    axis.set_yticks(at, [short(rows.labels[i], 26) for i in at])
    axis.tick_params(axis="y", length=0)


def _spread(number: int, most: int) -> list[int]:
    """At most about `most` of the places 0 .. number - 1, evenly spaced."""
    every = max(1, math.ceil(number / max(most, 1)))
    return list(range(0, number, every))


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` bound a band around it, `marked` draws its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart with its lines; `bars` draws them as bars."""

    title: str
    lines: Sequence[Line]
    x_name: str
    y_name: str
    floor: float | None = 0.0
    top: float | None = None
    bars: bool = False


@styled
def line_panels(panels: Sequence[Panel], *, across: int = 3) -> Figure:
    """Charts side by side. Lines differ in dashes and markers too, so that grey prints tell them apart."""
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = figure_of(down, across, (max(1.0 + 4.3 * across, 6.5), 3.5 * down + 0.3))
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    named = max(panels, key=lambda panel: len(panel.lines))
    if len(named.lines) > 1:
        handles, labels = axes[list(panels).index(named)].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _draw_panel(axis: Any, panel: Panel) -> None:
    for i, line in enumerate(panel.lines):
        colour, name = PALETTE[i % len(PALETTE)], short(line.name, 40)
        if panel.bars:
            axis.bar(line.x, line.y, 0.8, color=colour, label=name)
            continue
        marker = MARKERS[i % len(MARKERS)] if line.marked or len(line.x) == 1 else None
        axis.plot(
            line.x,
            line.y,
            color=colour,
            ls=DASHES[i % len(DASHES)],
            lw=1.8,
            marker=marker,
            ms=4.5,
            label=name,
        )
        if line.low is not None and line.high is not None:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, lw=0)
    axis.set_title(panel.title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(y=0.08)
    axis.set_xlabel(panel.x_name)
    axis.set_ylabel(panel.y_name)
    if panel.floor is not None:
        axis.set_ylim(panel.floor, max(axis.get_ylim()[1], panel.floor + 1e-9))
    if panel.top is not None:
        axis.set_ylim(top=panel.top)


def pick(number: int, most: int = MOST_PANELS) -> list[int]:
    """Up to `most` of 0 .. number - 1, evenly spread, first and last among them."""
    if number <= most:
        return list(range(number))
    return sorted({round(i * (number - 1) / (most - 1)) for i in range(most)})


def short(text: str, most: int = 30) -> str:
    """A name as a picture can show it: one line, letters the font has, the middle of long ones left out."""
    kept = "".join(c if c.isprintable() and (ord(c) < 0x250 or c in SIGNS) else "□" for c in text)
    return kept if len(kept) <= most else f"{kept[: most // 2 - 1]}…{kept[-(most - most // 2) :]}"
