"""What the routers did while training: who got the work, who got none, who worked together (`routing.jsonl`).

The pictures describe the later half of the recorded steps: early on, routers have not made up their minds. A step's
numbers are weighted by the tokens (or prompts) they were counted over.

Letters: L routers, C columns (experts or modules), S recorded steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramux.report.charts import (
    MOST_PANELS,
    Axis,
    Line,
    Panel,
    Scale,
    heat_maps,
    line_panels,
    pick,
)
from loramux.report.page import Missing, Picture, Section, Table, picture
from loramux.report.plots import short_name
from loramux.report.records import JobRecord, router_names
from loramux.report.uses import RouterUse, columns_of, kind_of, later_half, merge

MOST_MATRIX = 24  # columns of a co-activation map; of more only the commonest pairs are listed
TOP_PAIRS = 12


def expert_section(job: JobRecord, heading: str = "Experts") -> Section | Missing | None:
    """Shares, entropy, dead experts and co-activation of one job; None where its method has no router."""
    if not job.routing:
        if job.adapter is not None and job.adapter.router_parameters == 0:
            return None
        return Missing(
            f"{heading} (share, entropy, co-activation, dead)",
            "routing.jsonl is written by `loramux train` while a method with routers trains; for a saved adapter give "
            "`--base BASE --data FILE.jsonl`",
        )
    late = later_half(job.routing)
    uses = merge(late)
    first, last = late[0]["step"], late[-1]["step"]
    counted = sum(use.count for use in uses) // max(len(uses), 1)
    unit = uses[0].unit
    text = (
        f"Recorded at {len(job.routing)} steps; the maps show steps {first} to {last}, {counted:,} {unit} per router "
        "(the last micro-batch of each recorded step)."
    )
    figures = [share_picture(uses), balance_picture(uses), _over_steps(job.routing)]
    figures += together_pictures(uses)
    records = {
        "routing": {
            job.name: {
                "steps": [row["step"] for row in late],
                "routers": [u.to_dict() for u in uses],
            }
        }
    }
    return Section(heading, text, [_table(uses)], figures, records)


def share_picture(uses: Sequence[RouterUse]) -> Picture:
    """[routers, columns]: the share of each column, relative to an even share."""
    columns = columns_of(uses)
    at = {name: c for c, name in enumerate(columns)}
    table = np.full((len(uses), len(columns)), np.nan)
    for row, use in zip(table, uses, strict=True):
        for name, value in zip(use.columns, use.share, strict=True):
            row[at[name]] = 100 * value
    named = not all(name.isdigit() for name in columns)
    names = router_names([use.path for use in uses])
    figure = heat_maps(
        [("", table)],
        Axis(names, "layer" if all(name.isdigit() for name in names) else "router"),
        Axis([short_name(name) for name in columns], kind_of(columns), slanted=named),
        Scale("share of the work, per cent", crosses=True, number=".0f"),
    )
    dead = sum(use.dead for use in uses)
    most = max(uses, key=lambda use: float(use.share.max()))
    alt = (
        f"Heat map of {len(uses)} routers by {len(columns)} columns. Largest share {100 * most.share.max():.1f} per "
        f"cent, in {most.path}; {dead} columns were never chosen."
    )
    caption = (
        "Share of each router's selections (of its weight, where everything is always used). A cross: never chosen, "
        "a dead expert. Hatched: the router has no such column."
    )
    return picture(figure, alt, caption, _share_table(uses, columns))


def _share_table(uses: Sequence[RouterUse], columns: Sequence[str]) -> Table:
    if len(columns) > 24:
        rows: list[list[Any]] = []
        for use in uses:
            order = np.argsort(-use.share, kind="stable")[:5]
            top = ", ".join(f"{use.columns[c]} ({100 * use.share[c]:.1f})" for c in order)
            rows.append([use.path, top])
        return Table(("router", "largest shares, per cent"), rows)
    shares = [dict(zip(use.columns, use.share, strict=True)) for use in uses]
    return Table(
        ("router", *columns),
        [
            [
                use.path,
                *(
                    None if name not in own else round(100 * float(own[name]), 2)
                    for name in columns
                ),
            ]
            for use, own in zip(uses, shares, strict=True)
        ],
        "Share of the work, per cent",
    )


def balance_picture(uses: Sequence[RouterUse]) -> Picture:
    """Entropy, violation and dead columns over the layers; bands where a layer has several routers."""
    layers = sorted({use.layer for use in uses})
    groups = [[use for use in uses if use.layer == layer] for layer in layers]

    def line(values: Sequence[Sequence[float]]) -> list[Line]:
        mean = [float(np.mean(v)) for v in values]
        several = any(len(v) > 1 for v in values)
        low, high = (
            ([min(v) for v in values], [max(v) for v in values]) if several else (None, None)
        )
        return [Line("mean", layers, mean, low, high, marked=len(layers) < 40)]

    dead = [float(sum(use.dead for use in group)) for group in groups]
    entropies = line([[use.entropy for use in group] for group in groups])
    violations = line([[use.violation for use in group] for group in groups])
    panels = [
        Panel("Entropy", entropies, "layer", "0 decided, 1 undecided", top=1.05),
        Panel("Max violation", violations, "layer", "0 balanced"),
    ]
    if any(dead):
        panels.append(
            Panel("Dead", [Line("dead", layers, dead)], "layer", "columns never chosen", bars=True)
        )
    figure = line_panels(panels)
    entropy = float(np.mean([use.entropy for use in uses]))
    alt = (
        f"Charts over {len(layers)} layers: mean entropy {entropy:.2f}, mean max violation "
        f"{np.mean([use.violation for use in uses]):.2f}, {sum(map(int, dead))} dead experts in all."
    )
    caption = (
        "Entropy of the router's probabilities, and how far the busiest column is above an even share"
        + ("; columns never chosen." if any(dead) else ". No column is dead.")
        + " Bands reach from the lowest to the highest router of a layer."
    )
    return picture(figure, alt, caption)


def _over_steps(rows: Sequence[Mapping[str, Any]]) -> Picture:
    steps = [row["step"] for row in rows]
    each = [merge([row]) for row in rows]
    entropy = [float(np.mean([use.entropy for use in uses])) for uses in each]
    violation = [float(np.mean([use.violation for use in uses])) for uses in each]
    dead = [sum(use.dead for use in uses) for uses in each]
    name, mean = "optimizer step", "mean of the routers"
    panels = [
        Panel("Entropy", [Line("entropy", steps, entropy)], name, mean, top=1.05),
        Panel("Max violation", [Line("violation", steps, violation)], name, mean),
    ]
    if any(dead):
        panels.append(Panel("Unused", [Line("unused", steps, dead)], name, "columns, all routers"))
    figure = line_panels(panels)
    alt = (
        f"Curves from step {steps[0]} to {steps[-1]}: entropy {entropy[0]:.2f} to {entropy[-1]:.2f}, max violation "
        f"{violation[0]:.2f} to {violation[-1]:.2f}, unused columns {dead[0]} to {dead[-1]}."
    )
    table = Table(
        ("step", "entropy", "max violation", "unused"),
        [list(v) for v in zip(steps, entropy, violation, dead, strict=True)],
    )
    return picture(figure, alt, "The same over the steps, each from one micro-batch.", table)


def together_pictures(uses: Sequence[RouterUse]) -> list[Picture]:
    """Maps of joint use for some routers; nothing where one column, or every column, is used at a time."""
    joint = [use for use in uses if np.isfinite(use.pairs).any() and np.nansum(use.pairs) > 0]
    if not joint:
        return []
    table = _pairs_table(joint)
    small = [use for use in joint if len(use.columns) <= MOST_MATRIX]
    if not small:
        together = [
            float(np.nanmax(use.pairs) / max(np.nanmean(use.pairs), 1e-12)) for use in joint
        ]
        layers = list(range(len(joint)))
        figure = line_panels(
            [
                Panel(
                    "Commonest pair",
                    [Line("pair", layers, together)],
                    "router",
                    "times the mean pair",
                )
            ]
        )
        alt = (
            f"One curve over {len(joint)} routers: the commonest pair is used up to {max(together):.1f} times as often "
            "as the mean pair."
        )
        return [
            picture(
                figure,
                alt,
                "How much more often the commonest pair of experts is used than the mean pair.",
                table,
            )
        ]
    shown = [small[i] for i in pick(len(small), MOST_PANELS)]
    named = not all(name.isdigit() for name in shown[0].columns)
    alike = all(use.columns == shown[0].columns for use in shown)
    shown = shown if alike else [use for use in shown if use.columns == shown[0].columns]
    labels = [short_name(name) for name in shown[0].columns]
    figure = heat_maps(
        [
            (f"router {name}", 100 * use.pairs)
            for name, use in zip(router_names([u.path for u in shown]), shown, strict=True)
        ],
        Axis(labels, kind_of(shown[0].columns)),
        Axis(labels, slanted=named),
        Scale("used together, per cent", number=".0f"),
        across=3,
    )
    top = max(joint, key=lambda use: float(np.nanmax(use.pairs)))
    alt = (
        f"Co-activation maps of {len(shown)} routers; most often together: {100 * np.nanmax(top.pairs):.0f} per cent, "
        f"in {top.path}."
    )
    caption = (
        f"How often two columns are used together, of all {joint[0].unit}; {len(shown)} of {len(joint)} routers, "
        "evenly spread."
    )
    return [picture(figure, alt, caption, table)]


def _pairs_table(uses: Sequence[RouterUse]) -> Table:
    rows = []
    for use in uses:
        upper = np.triu(np.nan_to_num(use.pairs), 1)
        mean = float(upper.sum()) / max(len(use.columns) * (len(use.columns) - 1) / 2, 1)
        for at in np.argsort(-upper, axis=None, kind="stable")[: 3 if len(uses) > 4 else TOP_PAIRS]:
            i, j = divmod(int(at), upper.shape[1])
            if upper[i, j] > 0:
                pair = f"{use.columns[i]} + {use.columns[j]}"
                rows.append(
                    [
                        use.path,
                        pair,
                        round(100 * float(upper[i, j]), 2),
                        round(float(upper[i, j]) / mean, 2),
                    ]
                )
    return Table(("router", "pair", "together, per cent", "times the mean pair"), rows)


def _table(uses: Sequence[RouterUse]) -> Table:
    thin = [uses[i] for i in pick(len(uses), 40)]
    rows = [
        [
            use.path,
            len(use.columns),
            round(use.entropy, 4),
            round(use.violation, 4),
            use.dead,
            round(100 * float(use.share.max()), 2),
        ]
        for use in thin
    ]
    caption = f"{len(thin)} of {len(uses)} routers, evenly spread" if len(thin) < len(uses) else ""
    return Table(
        ("router", "columns", "entropy", "max violation", "dead", "largest share, per cent"),
        rows,
        caption,
    )
