"""What a row of ratios cannot show: latencies as distributions, time over resident adapters, what each kind costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loramux.report.plots import PALETTE

Result = Mapping[str, Any]
PERCENT = range(101)


def serving(axes: list[Any], result: Result) -> None:
    """How many requests, and how many tokens, came within a time."""
    spread = result["details"]["quantiles"]
    names = {"ttft": "time to first token", "itl": "time between tokens"}
    for part, (kind, name) in zip(axes, names.items(), strict=True):
        for colour, (title, values) in zip(PALETTE, spread.items(), strict=False):
            milliseconds = [max(1e3 * v, 1e-3) for v in values[kind]]
            part.plot(milliseconds, PERCENT, color=colour, label=title)
        part.set_xscale("log")
        low, high = part.get_xlim()
        ticks = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        part.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        part.minorticks_off()
        part.set_xlabel(f"{name}, ms")
        part.set_ylabel("percent within")
    axes[0].set_title(f"Poisson arrivals, {result['details']['rate']:.3g} a second", loc="left")
    axes[1].legend(fontsize=7, loc="lower right")


def residency(axes: list[Any], result: Result) -> None:
    """The ratio over the number of resident adapters, one line per number of adapters in the batch."""
    rows = [row for row in result["rows"] if row["what"] == "residency"]
    most = max(row["in_batch"] for row in rows)
    for colour, several in zip(PALETTE, (False, True), strict=False):
        own = [row for row in rows if (row["in_batch"] > 1) == several]
        if not own:
            continue
        x = [row["adapters"] for row in own]
        axes[0].plot(
            x,
            [row["ratio"] for row in own],
            "o-",
            color=colour,
            label=f"{most if several else 1} in the batch",
        )
        axes[0].fill_between(
            x,
            [row["low"] for row in own],
            [row["high"] for row in own],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    for target in {row["target"] for row in rows} - {None}:
        axes[0].axhline(target, color="#20262c", linewidth=1, linestyle="--", label="target")
    axes[0].axhline(1.0, color="#7f7f7f", linewidth=0.8)
    axes[0].set_xscale("log")
    counts = sorted({row["adapters"] for row in rows})
    axes[0].set_xticks(counts, [f"{count:,}" for count in counts])
    axes[0].minorticks_off()
    axes[0].set_xlabel("resident adapters")
    axes[0].set_ylabel("decode step / with one resident")
    axes[0].legend(fontsize=8)


def kinds(axes: list[Any], result: Result) -> None:
    """Milliseconds of a step, a bar per batch."""
    bars: dict[tuple[int, str], float] = {}
    for row in result["rows"]:
        if row["what"] == "control":
            continue
        bars[row["batch"], row["reference"]] = row["reference_ms"]
        bars[row["batch"], row["variant"]] = row["ms"]
    order = sorted(bars, key=lambda key: (key[0], bars[key]))
    batches = sorted({batch for batch, _ in order})
    colours = [PALETTE[batches.index(batch)] for batch, _ in order]
    axes[0].barh(range(len(order)), [bars[key] for key in order], color=colours)
    axes[0].set_yticks(
        range(len(order)), [f"batch {batch}: {title}" for batch, title in order], fontsize=8
    )
    axes[0].invert_yaxis()
    axes[0].grid(axis="y", visible=False)
    axes[0].set_xlabel("CPU time of a decode step, ms (median)")


# By measurement: how many pictures stand side by side, their height in inches, and who draws them.
PICTURES: Mapping[str, tuple[int, float, Callable[[list[Any], Result], None]]] = {
    "serve": (2, 3.6, serving),
    "residency": (1, 3.6, residency),
    "mixed": (1, 3.2, kinds),
}
