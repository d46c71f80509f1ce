"""How important each linear, and each rank row, was found: by a controller while training, or by a setting file.

`train/edits.py` says what a row of edits.json is read for; `core/placement.py` what a setting file holds.

Letters: R rank rows of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramux.report.charts import Axis, Scale, heat_maps, pick
from loramux.report.page import Missing, Picture, Section, Table, picture
from loramux.report.plots import short_name
from loramux.report.ranks import extremes, site_maps, site_table
from loramux.report.records import JobRecord, place_of
from loramux.report.training import method_of
from loramux.train.edits import importance_of_row, scores_of_row

SCORING = ("alora", "beamlora", "fanlora")
TERMS = {
    "score": "Score of every linear: what the choice is made by.",
    "removal": "The part of the score that says what is lost without the linear.",
    "alone": "The part of the score that says what the linear does alone.",
}


def importance_section(job: JobRecord, heading: str = "Importance") -> Section | Missing | None:
    """Scores of modules by a setting file or a controller's rounds, and of rank rows; None where nothing scores."""
    if isinstance(job.setting.get("layers"), list):
        return _setting_section(job, heading)
    rounds = module_scores(job.edits)
    ranks = rank_scores(job.edits)
    if not rounds and not ranks:
        if method_of(job) not in SCORING:
            return None
        what = f"{heading} of linears and ranks"
        if method_of(job) == "fanlora":
            return Missing(
                what,
                "the setting file it was trained with is not here; a fanlora run without one writes it",
            )
        return Missing(
            what,
            "no round of this run came to its end; rounds are written to edits.json of the run's folder",
        )
    figures, tables, text = [], [], ""
    if rounds:
        step, scores = list(rounds.items())[-1]
        text = _origin(job, step)
        figures.append(_score_picture(rounds, text))
        tables.append(_score_table(scores))
    if ranks:
        figures.append(_rank_score_picture(ranks))
    records = {
        "rounds": [{"step": s, "scores": v} for s, v in rounds.items()],
        "ranks": [{"site": p, "step": step, "scores": v} for p, (step, v) in ranks.items()],
    }
    return Section(heading, text, tables, figures, {"importance": {job.name: records}})


def _setting_section(job: JobRecord, heading: str) -> Section:
    """The scores of a setting with their two terms, and what it keeps."""
    setting = job.setting
    layers = [layer for layer in setting["layers"] if isinstance(layer, Mapping)]
    entries = {
        f"layers.{n}.{name}": entry
        for n, layer in enumerate(layers)
        for name, entry in layer.items()
    }
    terms = {
        key: {p: float(e[key]) for p, e in entries.items() if e.get(key) is not None}
        for key in TERMS
    }
    kept = {path for path, entry in entries.items() if entry.get("keep")}
    figures = [
        picture(
            site_maps([("", values)], Scale(key, low=None, number="auto")),
            extremes(f"Heat map of {key}", values),
            caption,
            site_table(values, ("layer",)),
        )
        for (key, caption), values in zip(TERMS.items(), terms.values(), strict=True)
        if values
    ]
    if kept:
        marks = {path: float(path in kept) for path in entries}
        alt = f"{len(kept)} of {len(entries)} linears are kept."
        maps = site_maps([("", marks)], Scale("kept", high=1.0))
        figures.append(
            picture(maps, alt, "Linears that the setting keeps: light.", _kept_table(layers))
        )
    facts = [[str(key), setting[key]] for key in ("scorer", "n_keep", "per") if key in setting]
    facts += [[f"loss, {key}", value] for key, value in dict(setting.get("losses") or {}).items()]
    if setting.get("agreement"):
        facts.append(["agreement of the layers, mean", float(np.mean(setting["agreement"]))])
    text = f"A setting file's scores, by the scorer {setting.get('scorer', 'not named')}; it keeps {len(kept)} linears."
    records = {"importance": {job.name: {"setting": dict(setting)}}}
    tables = [Table(("", "value"), facts, "The setting"), _score_table(terms["score"])]
    return Section(heading, text, tables, figures, records)


def _kept_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [number, ", ".join(short_name(name) for name, entry in layer.items() if entry.get("keep"))]
        for number, layer in enumerate(layers)
    ]
    return Table(("layer", "kept"), rows)


def module_scores(edits: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """step -> site -> score."""
    found = {}
    for row in edits:
        if values := importance_of_row(row):
            found[int(row.get("step", 0))] = values
    return found


def rank_scores(edits: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, list[float]]]:
    """site -> (step, score of each rank row), when the site was last scored."""
    found: dict[str, tuple[int, list[float]]] = {}
    for row in edits:
        if values := scores_of_row(row):
            found[row["site"]] = (int(row.get("step", 0)), values)
    return found


def _origin(job: JobRecord, step: int) -> str:
    named = next((row["score"] for row in job.edits if isinstance(row.get("score"), str)), "")
    return f"Importance as the controller scored it{f' ({named})' if named else ''}; the table is of step {step}."


def _score_table(scores: Mapping[str, float]) -> Table:
    order = sorted(scores, key=lambda path: -scores[path])
    shown = order if len(order) <= 20 else order[:10] + order[-10:]
    caption = "The ten most and the ten least important" if len(order) > 20 else "All linears"
    return Table(("linear", "score"), [[path, scores[path]] for path in shown], caption)


def _rank_score_picture(found: Mapping[str, tuple[int, Sequence[float]]]) -> Picture:
    paths = sorted(found, key=lambda path: place_of(path)[0])
    scores = {path: found[path][1] for path in paths}
    table = np.full((len(paths), max(map(len, scores.values()))), np.nan)
    for row, values in zip(table, scores.values(), strict=True):
        row[: len(values)] = values
    labels = [f"{place_of(path)[0]} {short_name(path)}" for path in paths]
    ranks = Axis([str(i) for i in range(table.shape[1])], "rank row")
    figure = heat_maps([("", table)], Axis(labels, "linear"), ranks, Scale("score", number=".2g"))
    low, high = np.nanmin(table), np.nanmax(table)
    alt = (
        f"Heat map of the scores of rank rows: {len(paths)} linears, from {low:.3g} to {high:.3g}."
    )
    rows = [[p, found[p][0], min(v), max(v), sum(v) / len(v)] for p, v in scores.items()]
    numbers = Table(("linear", "step", "lowest", "highest", "mean"), rows)
    caption = "Score of every rank row when its linear was last edited."
    return picture(figure, alt, caption, numbers)


def _score_picture(rounds: Mapping[int, Mapping[str, float]], title: str) -> Picture:
    steps = list(rounds)
    shown = [steps[i] for i in pick(len(steps))]
    panels = [("" if len(steps) == 1 else f"step {step}", rounds[step]) for step in shown]
    figure = site_maps(panels, Scale("score", low=None, number="auto"))
    last = rounds[steps[-1]]
    return picture(
        figure, extremes("Heat map of scores", last), title, site_table(last, ("layer",))
    )
