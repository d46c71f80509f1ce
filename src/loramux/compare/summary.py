"""The results over all rows of a suite: one entry per part and method, written as JSON, tables and pictures.

Letters: as in `stats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramux.compare.fusion import ONLY, PART, seeds_of_fusion
from loramux.compare.plan import Item, Plan, tokens_of
from loramux.compare.schema import Suite
from loramux.compare.scoring import row_scores
from loramux.compare.stats import Scores, mean_over_tasks, paired_bootstrap, row_error, spread
from loramux.compare.ways import BASE, EACH, ORACLE, ways

JSON_FILE, TABLES, PLOT = "results.json", "results.md", "results"
PARTS = ("multi", "single", PART)
MEASURES = (
    "train_seconds",
    "make_seconds",
    "peak_mb",
    "active",
    "parameters",
    "trainable_at_end",
    "extra_tokens",
    "search_tokens",
)
Row = Mapping[str, Any]
BySeed = dict[int, dict[str, Any]]
"""seed -> {"scores": {task: row scores}, "rows": the rows of results behind them}."""


def write_results(suite: Suite, plan: Plan, rows: Mapping[str, Row], out: Path) -> dict[str, Any]:
    """Write results.json, results.md, results.png and results.svg; returns what results.json holds."""
    from loramux.compare.plot import save_plots
    from loramux.compare.tables import markdown
    from loramux.formats.jsonio import write_json

    result = summarise(suite, plan, rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JSON_FILE, result)
    (out / TABLES).write_text(markdown(result), encoding="utf-8")
    if any(e["mean"] is not None for part in result["parts"].values() for e in part["methods"]):
        save_plots(result, out / PLOT)
    return result


def summarise(suite: Suite, plan: Plan, rows: Mapping[str, Row]) -> dict[str, Any]:
    """What the rows say; methods stand in the order of the suite. Rows of other suites are left out."""
    done = [(item, rows[item.id]) for item in plan.items if item.id in rows]
    failed = [
        {"row": item.title, "reason": row["reason"]} for item, row in done if row["status"] != "ok"
    ]
    parts = {}
    for name in PARTS:
        if getattr(suite, name) is not None:
            part = [(item, row) for item, row in done if row["status"] == "ok"]
            parts[name] = _part(suite, plan, name, part)
    return {
        "suite": suite.name,
        "base": suite.base,
        "metric": suite.metric,
        "reference": suite.reference,
        "budget": next(iter(plan.matched.values())).budget,
        "rows": {"planned": len(plan.items), "done": len(done), "failed": len(failed)},
        "matched": {
            label: {
                "fields": found.fields,
                "parameters": found.parameters,
                "deviation": round(found.deviation, 5),
                "how": found.how,
                "note": suite.methods[label].note,
            }
            for label, found in plan.matched.items()
        },
        "failed": failed,
        "parts": parts,
    }


def _part(suite: Suite, plan: Plan, name: str, done: Sequence[tuple[Item, Row]]) -> dict[str, Any]:
    """Tables of one part: an entry per method, each against the reference over the seeds that both have."""
    gathered = _gather(name, done)
    reference = suite.reference
    if name == PART:
        assert suite.fusion is not None
        reference = ORACLE
        gathered = _with_oracle(suite, gathered, _gather("single", done), suite.fusion.adapters)
    theirs = _scores(gathered.get(reference, {}))
    return {
        "reference": reference,
        "tasks": _tasks(suite, name),
        "tokens": tokens_of(plan.items, name),
        "methods": [
            _entry(label, by_seed, None if label == reference else theirs, _tasks(suite, name))
            for label, by_seed in gathered.items()
        ],
    }


def _gather(part: str, done: Sequence[tuple[Item, Row]]) -> dict[str, BySeed]:
    """Method -> seed -> scores by task; the rows of single tasks are put together."""
    gathered: dict[str, BySeed] = {}
    for item, row in done:
        if item.part != part:
            continue
        own = gathered.setdefault(item.label, {}).setdefault(item.seed, {"scores": {}, "rows": []})
        own["scores"] |= row_scores(row["scores"])
        own["rows"].append(row)
    return gathered


def _with_oracle(
    suite: Suite, fused: dict[str, BySeed], single: dict[str, BySeed], adapters: str
) -> dict[str, BySeed]:
    """The ways in the order of the table, with `oracle` made of the single-task trainings.

    The bare base has one row; it stands for every seed of the others.
    """
    tasks = _tasks(suite, PART)
    if BASE in fused:
        (bare,) = fused[BASE].values()
        fused = {**fused, BASE: dict.fromkeys(seeds_of_fusion(suite), bare)}
    oracle: BySeed = {}
    for seed, own in single.get(adapters, {}).items():
        if all(task in own["scores"] for task in tasks):
            rows = [row for row in own["rows"] if row["task"] in tasks]
            oracle[seed] = {"scores": {t: own["scores"][t] for t in tasks}, "rows": rows}
    found = {**fused, **({ORACLE: oracle} if oracle else {})}
    order = list(ways())

    def place(label: str) -> int:
        return order.index(EACH if label.startswith(ONLY) else label)

    return dict(sorted(found.items(), key=lambda pair: place(pair[0])))


def _entry(
    label: str, by_seed: BySeed, theirs: Mapping[int, Scores] | None, tasks: Sequence[str]
) -> dict[str, Any]:
    """One line of a table. Only seeds with all tasks count for the means."""
    whole = {s: own for s, own in _scores(by_seed).items() if all(t in own for t in tasks)}
    rows = [row for own in by_seed.values() for row in own["rows"]]
    means = {seed: mean_over_tasks(scores) for seed, scores in whole.items()}
    entry: dict[str, Any] = {
        "method": label,
        "seeds": list(whole),
        "mean": _mean(list(means.values())),
        "by_seed": list(means.values()),
        "spread": spread(list(means.values())),
        "row_error": row_error(list(whole.values())) if whole else None,
        "tasks": {task: _task(_scores(by_seed), task) for task in tasks},
        "difference": None,
    }
    if theirs:
        found = paired_bootstrap(whole, {s: t for s, t in theirs.items() if s in whole})
        if found is not None:
            entry["difference"] = {**asdict(found), "says": found.says}
    entry |= {name: _mean([r[name] for r in rows if r.get(name) is not None]) for name in MEASURES}
    costs = [row["decode"] for row in rows if row.get("decode")]
    entry["decode"] = (
        {key: _mean([cost[key] for cost in costs]) for key in ("value", "low", "high")}
        if costs
        else None
    )
    entry["servability"] = next((r["servability"] for r in rows if r.get("servability")), None)
    entry["notes"] = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    entry["tokens"] = sum(row.get("tokens", 0) for row in rows) / max(len(by_seed), 1)
    return entry


def _scores(by_seed: BySeed) -> dict[int, Scores]:
    return {seed: own["scores"] for seed, own in by_seed.items()}


def _task(scores: Mapping[int, Scores], task: str) -> dict[str, Any]:
    values = [mean_over_tasks({task: own[task]}) for own in scores.values() if task in own]
    return {"mean": _mean(values), "spread": spread(values)}


def _tasks(suite: Suite, part: str) -> list[str]:
    chosen: tuple[str, ...] | None = getattr(suite, part).tasks
    return list(chosen or suite.tasks)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
