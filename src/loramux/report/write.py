"""Writes a report folder: report.html, report.json, and every picture as a PNG beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.report import plots
from loramux.report.html import Picture, render
from loramux.report.page import finite

if TYPE_CHECKING:
    from loramux.report.routing import Routing

SCORE_KEYS = ("task", "metric", "before", "after", "rows")


def join_scores(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Two lists of evaluation results as one list of scores, in the order of `after`.

    Raises where the two were not measured on the same tasks, metrics and numbers of rows.
    """
    earlier = {(r["task"], r["metric"], r["rows"]): r for r in before}
    later = {(r["task"], r["metric"], r["rows"]): r for r in after}
    if set(earlier) != set(later):
        raise ValueError(
            "before and after were not measured alike; only in one of them: "
            f"{sorted(set(earlier) ^ set(later))}"
        )
    return [
        {
            "task": key[0],
            "metric": key[1],
            "before": earlier[key]["value"],
            "after": row["value"],
            "rows": key[2],
            "stderr_before": earlier[key].get("stderr"),
            "stderr_after": row.get("stderr"),
        }
        for key, row in later.items()
    ]


def write_report(
    out_dir: str | Path,
    *,
    title: str,
    scores: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]] = (),
    routing: Routing | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
    lead: str = "",
) -> Path:
    """Write the folder and return the path of report.html. What is empty is left out of the page.

    scores:  {"task", "metric", "before", "after", "rows"} each, see `join_scores`
    history: the trainer's rows, each with a "step" and any of "loss", "val_loss", "aux"
    samples: {"prompt", "before", "after"} each, and perhaps "task" and "answer"
    """
    out = Path(out_dir)
    for score in scores:
        missing = [key for key in SCORE_KEYS if key not in score]
        if missing:
            raise ValueError(f"the score {dict(score)} lacks {missing}; see join_scores")
    out.mkdir(parents=True, exist_ok=True)
    pictures = _draw(out, scores, history, routing)
    page = render(
        title=title,
        scores=scores,
        pictures=pictures,
        samples=samples,
        settings=settings or {},
        seconds=seconds,
        lead=lead,
    )
    content = {
        "title": title,
        "tasks": [dict(score) for score in scores],
        "seconds": seconds,
        "settings": settings or {},
        "routing": None if routing is None else routing.to_dict(),
        "samples": [dict(sample) for sample in samples],
        "history": [dict(row) for row in history],
        "pictures": [picture.path.name for picture in pictures],
    }
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _draw(
    out: Path,
    scores: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    routing: Routing | None,
) -> list[Picture]:
    pictures = []

    def add(section: str, name: str, figure: Any, caption: str) -> None:
        pictures.append(Picture(section, plots.save(figure, out / name), caption))

    if scores:
        caption = "First metric of each task before and after training; lines are standard errors."
        add("Scores at a glance", "scores.png", plots.score_chart(scores), caption)
    if any("loss" in row or "val_loss" in row for row in history):
        caption = "Loss over the supervised tokens; pale: single steps, strong: moving average."
        add("Training", "loss.png", plots.loss_curves(history), caption)
    if routing is not None:
        _draw_routing(add, routing)
    return pictures


def _draw_routing(add: Any, routing: Routing) -> None:
    what = "modules" if not all(c.isdigit() for c in routing.columns) else "experts"
    caption = f"Which {what} the {routing.unit} of each task are routed to, layer by layer."
    add("Routing", "routing.png", plots.routing_map(routing), caption)
    if len(routing.tasks) > 1:
        caption = "The same, minus the mean of all tasks: what a task does differently."
        figure = plots.routing_map(routing, difference=True)
        add("Routing", "routing_difference.png", figure, caption)
    caption = f"Left: how undecided the router is. Right: how its choices are shared by the {what}."
    add("Routing", "router.png", plots.router_lines(routing), caption)
