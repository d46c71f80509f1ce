"""Many adapters on the same task files in one load of the base: rows of different adapters share batches.

Why it is exact: a row is judged alone, and an adapter acts on its own rows only, so what a batch holds beside a row
changes the rounding of its scores and nothing else. What is added up per adapter is what `run.py` adds up.

A cell is one adapter on one task. With `cells` finished ones are kept in a file of JSON lines, found by the content of
adapter, base and rows, and not scored again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.eval.progress import Advance, rows_bar
from loramux.eval.run import (
    Result,
    answers,
    check_metrics,
    eval_mode,
    hits,
    judge,
    mean_and_error,
    read_tasks,
)

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow
    from loramux.eval.loading import Loaded
    from loramux.recipe import Template

BASE = "base"  # how the base without an adapter is called on the board
CELL_START = '{"key": '


def evaluate_many(
    base: str | Path,
    adapters: Sequence[str | Path],
    data: Sequence[str | Path],
    rows: int | None = None,
    *,
    against_base: bool = False,
    template: Template | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    threads: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
    cells: str | Path | None = None,
) -> dict[str, Any]:
    """Load a base once and score every adapter on every task; the arguments are those of `evaluate`.

    against_base: score the bare base too, and give every adapter's mean difference to it over the same rows, with the
    standard error of that difference. All adapters are loaded, and refused, before anything is scored.
    Returns {"results": [{"adapter", "task", "metric", "value", "stderr", "rows", "difference", "difference_stderr"}],
    "base", "adapters", "seconds"}; an adapter goes by its path, the base by "base", differences are None without it.
    """
    from loramux.eval.loading import load_model

    start = time.perf_counter()
    folders = _folders(adapters)
    if against_base and BASE in folders:
        raise LoramuxError(
            f"{BASE!r} is the base's own row; write the adapter's folder as ./{BASE}"
        )
    tasks = read_tasks(data, rows)
    wanted = check_metrics(tasks, metrics)
    if batch_size < 1:
        raise LoramuxError(f"batch_size must be at least 1, got {batch_size}")
    if task is not None:
        tasks = {name: [replace(row, task=task) for row in own] for name, own in tasks.items()}
    loaded = load_model(base, None, dtype=dtype, threads=threads)
    names = _load(loaded, folders)
    subjects = {BASE: None, **names} if against_base else dict(names)
    kept = Cells(cells, _settings(loaded, template, metrics), folders)
    board = Board(loaded, subjects, "task" if template is None else template, batch_size)
    found = board.score(tasks, wanted, kept, progress)
    return {
        "results": with_differences(found) if against_base else [_plain(row) for row in found],
        "base": str(base),
        "adapters": list(names),
        "seconds": round(time.perf_counter() - start, 3),
    }


class Board:
    """Subjects (path -> name of its adapter on the handle, None for the base) over tasks."""

    def __init__(
        self,
        loaded: Loaded,
        subjects: Mapping[str, str | None],
        template: Template,
        batch_size: int,
    ):
        self.loaded = loaded
        self.subjects = dict(subjects)
        self.template = template
        self.batch_size = batch_size

    def score(
        self,
        tasks: Mapping[str, Sequence[TaskRow]],
        wanted: Mapping[str, Sequence[str]],
        cells: Cells,
        progress: bool,
    ) -> list[Result]:
        """Results with row scores, by subject and then by task, in the order given."""
        total = len(self.subjects) * sum(map(len, tasks.values()))
        found: dict[tuple[str, str], list[Result]] = {}
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.loaded.model))
            step = stack.enter_context(rows_bar(progress, "Scoring", total))
            for task, rows in tasks.items():
                keys = {subject: cells.key(subject, rows) for subject in self.subjects}
                todo = [subject for subject in self.subjects if keys[subject] not in cells.known]
                advance = step(task)
                advance((len(self.subjects) - len(todo)) * len(rows))
                made = self._score(todo, rows, wanted[task], advance) if todo else {}
                for subject in self.subjects:
                    if subject in made:
                        cells.put(keys[subject], _results(task, rows, made[subject]))
                    found[subject, task] = cells.known[keys[subject]]
        return [
            {"adapter": subject, **row, "task": task}
            for subject in self.subjects
            for task in tasks
            for row in found[subject, task]
        ]

    def _score(
        self,
        subjects: Sequence[str],
        rows: Sequence[TaskRow],
        metrics: Sequence[str],
        advance: Advance,
    ) -> dict[str, dict[str, Any]]:
        """Scores by subject and metric; all rows of all subjects go through the same batches."""
        num = len(rows)
        everything = [row for _ in subjects for row in rows]
        owners = [self.subjects[subject] for subject in subjects for _ in rows]
        common = (self.loaded.model, self.loaded.tokenizer, everything, self.template, metrics)
        spans = {subject: slice(i * num, (i + 1) * num) for i, subject in enumerate(subjects)}
        if not rows[0].choices:
            texts = answers(*common, self.batch_size, advance, owners)
            return {subject: judge(texts[own], rows, metrics) for subject, own in spans.items()}
        right = hits(*common, self.batch_size, advance, owners)
        return {
            subject: {m: (*mean_and_error(right[m][own]), right[m][own]) for m in metrics}
            for subject, own in spans.items()
        }


class Cells:
    """Finished cells, in a file if one is named. settings: whatever else a score depends on."""

    def __init__(self, path: str | Path | None, settings: str, folders: Mapping[str, Path]):
        from loramux.formats.digest import folder_digest

        self.path = None if path is None else Path(path)
        self.settings = settings
        self.digests = {
            name: "" if path is None else folder_digest(folder) for name, folder in folders.items()
        }
        self.known: dict[str, list[Result]] = {}
        self._gap = ""  # behind a line that was cut short
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def key(self, subject: str, rows: Sequence[TaskRow]) -> str:
        own = [] if self.path is not None else [subject]  # without a file nothing outlives its name
        content = [self.settings, self.digests.get(subject, BASE), *own, *map(astuple, rows)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def put(self, key: str, results: list[Result]) -> None:
        self.known[key] = results
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._gap + json.dumps({"key": key, "results": results}) + "\n")
            self._gap = ""

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self._gap = "\n" if text and not text.endswith("\n") else ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                cell = json.loads(line)
                self.known[cell["key"]] = cell["results"]
            except (ValueError, KeyError, TypeError):
                if line.startswith(CELL_START):  # cut short when the evaluation was killed
                    continue
                raise LoramuxError(
                    f"{path}:{number} is no finished cell; give the file of an earlier evaluation, or a new one"
                ) from None


def with_differences(results: Sequence[Result]) -> list[Result]:
    """Every result with its mean difference to the base over the same rows; None where rows have no scores (BLEU)."""
    bases = {(row["task"], row["metric"]): row for row in results if row["adapter"] == BASE}
    out = []
    for row in results:
        other = bases[row["task"], row["metric"]]
        mean: float | None = row["value"] - other["value"]
        error = None
        if row["row_scores"] is not None:
            pairs = zip(row["row_scores"], other["row_scores"], strict=True)
            mean, error = mean_and_error([mine - its for mine, its in pairs])
        if row["adapter"] == BASE:
            mean = error = None
        out.append({**_plain(row), "difference": mean, "difference_stderr": error})
    return out


def _results(task: str, rows: Sequence[TaskRow], scores: Mapping[str, Any]) -> list[Result]:
    return [
        {"task": task, "metric": metric, "value": value, "stderr": stderr, "rows": len(rows),
         "row_scores": row_scores}
        for metric, (value, stderr, row_scores) in scores.items()
    ]  # fmt: skip


def _plain(row: Result) -> Result:
    kept = {key: value for key, value in row.items() if key != "row_scores"}
    return {**kept, "difference": None, "difference_stderr": None}


def _folders(adapters: Sequence[str | Path]) -> dict[str, Path]:
    """The folders by how they were written, each once and each there."""
    if not adapters:
        raise LoramuxError("no adapter was given; name at least one folder")
    named = {str(adapter): Path(adapter).expanduser() for adapter in adapters}
    places = [folder.resolve() for folder in named.values()]
    if len(named) < len(adapters) or len(set(places)) < len(places):
        raise LoramuxError(
            f"an adapter is named twice in {[str(a) for a in adapters]}; name it once"
        )
    for text, folder in named.items():
        if not folder.is_dir():
            raise LoramuxError(f"no adapter folder at {text!r}; give folders of saved adapters")
    return named


def _load(loaded: Loaded, folders: Mapping[str, Path]) -> dict[str, str]:
    """Put every adapter on the base; returns the name on the handle of each path."""
    import loramux

    handle: Any = None
    names = {text: f"adapter-{i}" for i, text in enumerate(folders)}
    for text, folder in folders.items():
        try:
            if handle is None:
                handle = loramux.load(loaded.model, folder, name=names[text])
            else:
                handle.load(folder, name=names[text])
        except ValueError as error:
            raise LoramuxError(f"{text}: {error}") from error
    return names


def _settings(loaded: Loaded, template: Template | None, metrics: Sequence[str] | None) -> str:
    from loramux.persist import digest_of_base

    named = template if template is None or isinstance(template, str) else template.model_dump()
    dtype = str(loaded.model.dtype)
    return json.dumps([digest_of_base(loaded.model), dtype, named, list(metrics or ())])
