"""Scores of a model on task files: ranking where rows have choices, generation where they have none.

Metrics, by the names in the results:
    token, raw, byte  accuracy in [0, 1] of ranking the choices by the mean log-probability per token,
                      by its sum, or by the sum over the bytes of the continuation (space included)
    exact_match       share in [0, 1] of greedy answers whose first line is right
    bleu              corpus BLEU, 0 to 100, of the first lines against all references
A row is judged alone, so the order and the size of batches do not matter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from loramux.eval.progress import Advance, rows_bar
from loramux.eval.ranking import METRICS as RANKING_METRICS

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow
    from loramux.recipe import Template

METRICS = (*RANKING_METRICS, "exact_match", "bleu")
NEW_TOKENS = {"exact_match": 24, "bleu": 64}
Result = dict[str, Any]
# Value, standard error, and the score of every row in the rows' order where rows have scores of their own.
Score = tuple[float, float | None, list[float] | None]


def evaluate(
    base: str | Path,
    adapter: str | Path | None = None,
    data: Sequence[str | Path] = (),
    rows: int | None = None,
    template: Template | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    threads: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """Load a base (and an adapter) and score it on the first `rows` rows of every task file.

    Adapters that weigh their experts by the task are told each row's own, or `task` for all.
    Returns {"results": [{"task", "metric", "value", "stderr", "rows"}], "base", "adapter", "seconds"}.
    """
    from loramux.eval.loading import load_model

    start = time.perf_counter()
    # Read the data before the model: a wrong path should not cost a model load.
    tasks = read_tasks(data, rows)
    check_metrics(tasks, metrics)
    if task is not None:
        tasks = {name: [replace(row, task=task) for row in own] for name, own in tasks.items()}
    loaded = load_model(base, adapter, dtype=dtype, threads=threads)
    results = evaluate_model(
        loaded.model,
        loaded.tokenizer,
        tasks,
        template=template,
        metrics=metrics,
        batch_size=batch_size,
        progress=progress,
    )
    return {
        "results": results,
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "seconds": round(time.perf_counter() - start, 3),
    }


def read_tasks(data: Sequence[str | Path], rows: int | None = None) -> dict[str, list[TaskRow]]:
    """The first `rows` rows of each file, by task, in the order they are met."""
    from loramux.data.tasks import read_task
    from loramux.errors import DataError

    if not data:
        raise DataError("no data was given; name at least one task file")
    if rows is not None and rows < 1:
        raise DataError(f"rows must be at least 1, got {rows}; leave it out to take all rows")
    tasks: dict[str, list[TaskRow]] = {}
    for path in data:
        for row in read_task(path, rows):
            tasks.setdefault(row.task, []).append(row)
    return tasks


def evaluate_model(
    model: Any,
    tokenizer: Any,
    rows_by_task: Mapping[str, Sequence[TaskRow]],
    *,
    template: Template | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    title: str = "Evaluating",
    per_row: bool = False,
) -> list[Result]:
    """The results of `evaluate` for a model that is already there.

    The model is put into eval mode and back. Of an attached model, the adapter in use is measured. per_row: each
    result also has "row_scores", 1.0 or 0.0 for every row in the given order; None for BLEU, no mean over rows.
    """
    template = "task" if template is None else template
    wanted = check_metrics(rows_by_task, metrics)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    results: list[Result] = []
    total = sum(len(rows) for rows in rows_by_task.values())
    with eval_mode(model), rows_bar(progress, title, total) as step:
        for task, rows in rows_by_task.items():
            measure = _rank if rows[0].choices else _generate
            scores = measure(model, tokenizer, rows, template, wanted[task], batch_size, step(task))
            for metric, (value, stderr, row_scores) in scores.items():
                result = {
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "stderr": stderr,
                    "rows": len(rows),
                }
                results.append(result | ({"row_scores": row_scores} if per_row else {}))
    return results


def check_metrics(
    rows_by_task: Mapping[str, Sequence[TaskRow]], metrics: Sequence[str] | None
) -> dict[str, list[str]]:
    """Which metrics each task gets; raises where one is unknown or fits none of the tasks."""
    from loramux.errors import DataError, suggest

    for name in metrics or ():
        if name not in METRICS:
            raise DataError(f"unknown metric {name!r}; {suggest(name, METRICS)}")
    wanted = {}
    for task, rows in rows_by_task.items():
        possible = _possible(task, rows)
        default = list(RANKING_METRICS) if rows[0].choices else possible[:1]
        wanted[task] = [m for m in metrics if m in possible] if metrics else default
        if not wanted[task]:
            raise DataError(
                f"task {task!r} can be scored with {', '.join(possible)}, "
                f"not with {', '.join(metrics or ())}"
            )
    return wanted


def _possible(task: str, rows: Sequence[TaskRow]) -> list[str]:
    from loramux.errors import DataError

    if not rows:
        raise DataError(f"task {task!r} has no rows")
    with_choices = sum(bool(row.choices) for row in rows)
    if with_choices == len(rows):
        return list(RANKING_METRICS)
    if with_choices:
        raise DataError(
            f"task {task!r} has choices in {with_choices} of {len(rows)} rows; give the rows without "
            "choices another task name"
        )
    return ["bleu", "exact_match"] if all(row.references for row in rows) else ["exact_match"]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (sample deviation over the root of n); None for a single value."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return fmean(values), error


def _rank(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TaskRow],
    template: Template,
    metrics: Sequence[str],
    batch_size: int,
    advance: Advance,
) -> dict[str, Score]:
    found = hits(model, tokenizer, rows, template, metrics, batch_size, advance)
    return {metric: (*mean_and_error(values), values) for metric, values in found.items()}


def hits(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TaskRow],
    template: Template,
    metrics: Sequence[str],
    batch_size: int,
    advance: Advance,
    adapters: Sequence[str | None] | None = None,
) -> dict[str, list[float]]:
    """1.0 for every row whose right choice is ranked first, else 0.0, by metric. adapters: each row's, by name."""
    from loramux.eval.encode import encode_choices
    from loramux.eval.generation import pad_token
    from loramux.eval.ranking import choice_scores

    known = {id(row): encode_choices(row, tokenizer, template) for row in rows}
    coded = [known[id(row)] for row in rows]
    check_length(model, {row.id: c.max_position for row, c in zip(rows, coded, strict=True)})
    pad = pad_token(tokenizer)
    found: dict[str, list[float]] = {metric: [0.0] * len(rows) for metric in metrics}
    for part in _batches([row.num_tokens for row in coded], batch_size):
        scored = choice_scores(
            model,
            [coded[i] for i in part],
            pad_token_id=pad,
            adapters=None if adapters is None else [adapters[i] for i in part],
        )
        for i, scores in zip(part, scored, strict=True):
            right = (rows[i].choices or ()).index(rows[i].answer)
            for metric in metrics:
                found[metric][i] = float(scores.best(metric) == right)
        advance(len(part))
    return found


def _generate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TaskRow],
    template: Template,
    metrics: Sequence[str],
    batch_size: int,
    advance: Advance,
) -> dict[str, Score]:
    texts = answers(model, tokenizer, rows, template, metrics, batch_size, advance)
    return judge(texts, rows, metrics)


def judge(
    texts: Sequence[str], rows: Sequence[TaskRow], metrics: Sequence[str]
) -> dict[str, Score]:
    """Scores of generated answers."""
    from loramux.eval.generation import bleu, first_line, matches

    scores: dict[str, Score] = {}
    for metric in metrics:
        if metric == "bleu":
            lines = [first_line(text) for text in texts]
            scores[metric] = (*bleu(lines, [row.references for row in rows]), None)
        else:
            right = [float(matches(t, row.answer)) for t, row in zip(texts, rows, strict=True)]
            scores[metric] = (*mean_and_error(right), right)
    return scores


def answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TaskRow],
    template: Template = "task",
    metrics: Sequence[str] = ("exact_match",),
    batch_size: int = 16,
    advance: Advance = lambda _: None,
    adapters: Sequence[str | None] | None = None,
) -> list[str]:
    """Greedy answers to the questions, one per row; only their first lines are complete. adapters: as for `hits`."""
    from loramux.data.encode import encode_answer
    from loramux.eval.encode import continuation, encode_question
    from loramux.eval.generation import greedy

    prompts = [encode_question(row, tokenizer, template) for row in rows]
    longest = max(len(encode_answer(tokenizer, continuation(r.answer, template))) for r in rows)
    # A longer right answer must fit, and a little more shows that the model stops there.
    new_tokens = max(longest + 4, *(NEW_TOKENS[metric] for metric in metrics))
    check_length(model, {r.id: len(p) + new_tokens for r, p in zip(rows, prompts, strict=True)})
    texts = [""] * len(rows)
    for part in _batches([len(prompt) for prompt in prompts], batch_size):
        made = greedy(
            model,
            tokenizer,
            [prompts[i] for i in part],
            max_new_tokens=new_tokens,
            first_line_only=True,
            tasks=[rows[i].task for i in part],
            adapters=None if adapters is None else [adapters[i] for i in part],
        )
        for i, tokens in zip(part, made, strict=True):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        advance(len(part))
    return texts


def check_length(model: Any, lengths: Mapping[str, int]) -> None:
    """Refuse rows that reach beyond the positions the model has; `lengths` by row id."""
    from loramux.errors import DataError

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    too_long = [name for name, length in lengths.items() if limit and length > limit]
    if too_long:
        raise DataError(
            f"{len(too_long)} rows are longer than the {limit} positions of the model, the first is "
            f"{too_long[0]!r} with {lengths[too_long[0]]}; drop them or use another base"
        )


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of rows of like length together: little padding. The longest come first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
