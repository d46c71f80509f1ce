"""Scores of a model on the test rows of a suite's tasks, with the score of every single row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loramux.recipe import DataSource

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow


def read_test(task: str, source: DataSource) -> list[TaskRow]:
    """The test rows, under the name that the suite gives their task."""
    from loramux.data.sources import read_rows
    from loramux.data.tasks import parse_task_row

    rows = [parse_task_row(row, where, task) for row, where, _ in read_rows(source)]
    return [replace(row, task=task) for row in rows]


def score(
    model: Any,
    tokenizer: Any,
    tests: Mapping[str, Mapping[str, Any]],
    metric: str,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """{task: {value, stderr, rows}}; `rows` is a text with one 1 or 0 per test row, in order."""
    from loramux.eval.run import evaluate_model

    rows = {task: read_test(task, DataSource(**source)) for task, source in tests.items()}
    # One task at a time: a metric that fits none of a task's rows is then an error that names it.
    results = [
        result
        for task in rows
        for result in evaluate_model(
            model,
            tokenizer,
            {task: rows[task]},
            metrics=[metric],
            batch_size=batch_size,
            progress=False,
            per_row=True,
        )
    ]
    return {
        result["task"]: {
            "value": result["value"],
            "stderr": result["stderr"],
            "rows": "".join(str(int(one)) for one in result["row_scores"]),
        }
        for result in results
    }


def row_scores(scored: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Task -> score of every test row, from what `score` returned."""
    return {task: [float(digit) for digit in one["rows"]] for task, one in scored.items()}
