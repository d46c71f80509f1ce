"""The tables of `loramux.demo.many`: each task against its solo run, and what each way of training cost.

A difference is that of the same test rows under both adapters, over all seeds; it counts as noise below two standard
errors. BLEU is no mean over rows: its errors are those of both scores, which is more than that of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Json = dict[str, Any]
NOISE = 2.0  # standard errors


@dataclass(frozen=True)
class Results:
    """What the parts left: joint by seed, solo by seed and task, PEFT by task (one seed)."""

    tasks: Sequence[str]
    seeds: Sequence[int]
    described: str
    base: Json
    joint: Mapping[int, Json]
    solo: Mapping[int, Sequence[Json]]
    peft: Sequence[Json]


def summary(results: Results) -> Json:
    """{"tasks": [...], "cost": [...], "within_noise": bool} as plain values."""
    tasks = [_task(results, number, task) for number, task in enumerate(results.tasks)]
    return {
        "tasks": tasks,
        "cost": _cost(results),
        "within_noise": all(row["within_noise"] for row in tasks),
        "mean_difference": _mean_difference(tasks),
        "threads": results.base["threads"],
        "described": results.described,
    }


def _task(results: Results, number: int, task: str) -> Json:
    pairs = [
        (results.joint[seed]["scores"][task], results.solo[seed][number]["scores"][task])
        for seed in results.seeds
    ]
    joint, solo = (fmean(score["value"] for score in side) for side in zip(*pairs, strict=True))
    error = _error(pairs)
    losses = [
        [
            results.joint[seed]["training"]["loss"][task],
            results.solo[seed][number]["training"]["loss"][task],
        ]
        for seed in results.seeds
    ]
    difference = joint - solo
    return {
        "task": task,
        "metric": pairs[0][0]["metric"],
        "rows": pairs[0][0]["rows"],
        "base": results.base["scores"][task]["value"],
        "joint": joint,
        "solo": solo,
        "difference": difference,
        "stderr": error,
        "within_noise": abs(difference) <= NOISE * error,
        "by_seed": [[a["value"], b["value"]] for a, b in pairs],
        "loss_by_seed": losses,
    }


def _error(pairs: Sequence[tuple[Json, Json]]) -> float:
    """Standard error of the mean difference over seeds and rows. Rows are the same for all seeds, so they are averaged
    over seeds first."""
    if pairs[0][0]["row_scores"] is None:
        variances = [(score["stderr"] or 0.0) ** 2 for pair in pairs for score in pair]
        return math.sqrt(sum(variances)) / len(pairs)
    by_seed = [
        [a - b for a, b in zip(joint["row_scores"], solo["row_scores"], strict=True)]
        for joint, solo in pairs
    ]
    rows = [fmean(row) for row in zip(*by_seed, strict=True)]
    if len(rows) < 2:
        return 0.0
    mean = fmean(rows)
    return math.sqrt(sum((row - mean) ** 2 for row in rows) / (len(rows) - 1) / len(rows))


def _mean_difference(tasks: Sequence[Json]) -> Json:
    """Over the tasks whose scores are shares of rows."""
    shares = [row for row in tasks if row["metric"] != "bleu"]
    if not shares:
        return {"value": 0.0, "stderr": 0.0, "tasks": 0}
    error = math.sqrt(sum(row["stderr"] ** 2 for row in shares)) / len(shares)
    return {
        "value": fmean(row["difference"] for row in shares),
        "stderr": error,
        "tasks": len(shares),
    }


def _cost(results: Results) -> list[Json]:
    """One row per way of training all tasks once, with the first seed."""
    first = results.seeds[0]
    ways = {
        "together in loramux, one process": [results.joint[first]],
        "one after the other in loramux": results.solo[first],
        "one after the other in PEFT (a bare loop, nothing written)": results.peft,
    }
    rows = []
    for way, some in ways.items():
        trained = [result["training"] for result in some]
        tokens, seconds = (sum(t[key] for t in trained) for key in ("tokens", "seconds"))
        peaks = [t["peak_mb"] for t in trained if t["peak_mb"] is not None]
        rows.append(
            {
                "way": way,
                "tokens": tokens,
                "seconds": seconds,
                "cpu_seconds": sum(t["cpu_seconds"] for t in trained),
                "tokens_per_second": tokens / seconds,
                "peak_mb": max(peaks, default=None),
                "at_once_mb": sum(peaks) if peaks else None,
            }
        )
    return rows


def page(results: Results) -> str:
    """The tables in Markdown."""
    report = summary(results)
    seeds = ", ".join(map(str, results.seeds))
    lines = [
        f"{report['described']}; seeds {seeds}; {report['threads']} threads.",
        "",
        "| task | metric | rows | base | together | alone | difference | standard error | within noise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_task_line(row) for row in report["tasks"]),
        "",
        _verdict(report),
        "",
        "| one run of each task | tokens | seconds | CPU seconds | tokens/s | peak memory above the base, MB | "
        "all at once, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_cost_line(row) for row in report["cost"]),
        "",
        *_ratios(report["cost"]),
        "",
    ]
    return "\n".join(lines)


def _task_line(row: Json) -> str:
    digits = 1 if row["metric"] == "bleu" else 3

    def shown(key: str, sign: str = "") -> str:
        return f"{row[key]:{sign}.{digits}f}"

    answer = "yes" if row["within_noise"] else "no"
    cells = [row["task"], row["metric"], str(row["rows"]), shown("base"), shown("joint")]
    cells += [shown("solo"), shown("difference", "+"), shown("stderr"), answer]
    return f"| {' | '.join(cells)} |"


def _verdict(report: Json) -> str:
    mean = report["mean_difference"]
    outside = [row["task"] for row in report["tasks"] if not row["within_noise"]]
    told = (
        f"outside two standard errors: {', '.join(outside)}"
        if outside
        else "every difference is within two standard errors"
    )
    return (
        f"Mean difference over {mean['tasks']} tasks with accuracies: {mean['value']:+.4f} "
        f"(standard error {mean['stderr']:.4f}); {told}."
    )


def _cost_line(row: Json) -> str:
    cells = [row["way"], f"{row['tokens']:,}", f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
    cells.append(f"{row['tokens_per_second']:,.0f}")
    cells += ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("peak_mb", "at_once_mb")]
    return f"| {' | '.join(cells)} |"


def _ratios(cost: Sequence[Json]) -> list[str]:
    joint, *others = cost
    lines = []
    for other in others:
        parts = [
            f"{what} {joint[key] / other[key]:.2f}"
            for what, key in (("time", "seconds"), ("CPU time", "cpu_seconds"))
        ]
        if joint["peak_mb"] and other["at_once_mb"]:
            parts.append(f"memory {joint['peak_mb'] / other['at_once_mb']:.2f} of all at once")
        lines.append(f"* together / {other['way']}: {', '.join(parts)}")
    return lines
