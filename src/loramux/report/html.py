"""One HTML file that holds the whole report, pictures included.

Why a template with automatic escaping: samples are model output and settings are user input; neither
may become markup.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.report.page import environment
from loramux.report.plots import METRIC_NAMES, headline, percent


@dataclass(frozen=True)
class Picture:
    """A PNG with the sentence under it; `section` is the heading it stands under."""

    section: str
    path: Path
    caption: str


def render(
    *,
    title: str,
    scores: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    seconds: float,
    lead: str = "",
) -> str:
    """The page as text. Loads nothing from the network and runs no script."""
    text: str = (
        environment()
        .get_template("template.html.j2")
        .render(
            title=title,
            lead=lead,
            tiles=_tiles(scores, seconds),
            table=_table(scores),
            figures=_figures(pictures),
            samples=[_sample(sample) for sample in samples],
            settings=json.dumps(settings, indent=2, default=str, ensure_ascii=False)
            if settings
            else "",
        )
    )
    return text


def duration(seconds: float) -> str:
    """`75 s` up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _tiles(scores: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, str]]:
    tiles = []
    chosen = [score for score in headline(scores) if score["metric"] != "bleu"]
    if chosen:
        before = sum(percent(s["metric"], s["before"]) for s in chosen) / len(chosen)
        after = sum(percent(s["metric"], s["after"]) for s in chosen) / len(chosen)
        label = f"mean accuracy of {len(chosen)} tasks" if len(chosen) > 1 else "accuracy"
        tiles += [
            {"value": f"{before:.1f} %", "label": f"{label}, before"},
            {"value": f"{after:.1f} %", "label": f"{label}, after"},
            {"value": f"{after - before:+.1f}", "label": "points gained"},
        ]
    tiles.append({"value": duration(seconds), "label": "for the whole run"})
    return tiles


def _table(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    last = None
    for score in scores:
        metric, task = score["metric"], score["task"]
        change = percent(metric, score["after"]) - percent(metric, score["before"])
        rows.append(
            {
                "task": task,
                "metric": METRIC_NAMES.get(metric, metric),
                "rows": score["rows"],
                "before": f"{percent(metric, score['before']):.1f}",
                "after": f"{percent(metric, score['after']):.1f}",
                "before_error": _error(metric, score.get("stderr_before")),
                "after_error": _error(metric, score.get("stderr_after")),
                "change": f"{change:+.1f}",
                "sign": "up" if change > 0.05 else "down" if change < -0.05 else "",
                "place": "again" if task == last else "first" if rows else "",
            }
        )
        last = task
    return rows


def _error(metric: str, value: float | None) -> str:
    return "" if value is None else f"{percent(metric, value):.1f}"


def _figures(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    sections: dict[str, list[dict[str, str]]] = {}
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
        entry = {"alt": picture.caption, "caption": picture.caption, "data": data}
        sections.setdefault(picture.section, []).append(entry)
    return [{"title": title, "figures": figures} for title, figures in sections.items()]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    names = ("prompt", "before", "after", "answer")
    fields = [
        (name, str(sample[name]).strip("\n")) for name in names if sample.get(name) is not None
    ]
    return {"task": sample.get("task", ""), "fields": fields}
