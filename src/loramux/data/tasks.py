"""Task rows: a plain question, perhaps its candidate answers, and the right one.

Why apart from training: evaluation reads the same rows through the same template, so what is measured is what
was trained. The instruction text lives in the template, never in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.data.sources import read_rows
from loramux.errors import DataError
from loramux.recipe import DataSource, Template, TextTemplate

TASK_TEMPLATE = TextTemplate(prompt="Question: {prompt}\nAnswer:", completion=" {answer}")


@dataclass(frozen=True)
class TaskRow:
    """`choices` is None where the answer is generated; `references` holds every accepted text for BLEU."""

    task: str
    id: str
    prompt: str
    choices: tuple[str, ...] | None
    answer: str
    references: tuple[str, ...] = ()


def read_task(path: str | Path, rows: int | None = None) -> list[TaskRow]:
    """The first `rows` rows of a task file (all without it)."""
    source = DataSource(path=str(path), rows=rows)
    return [parse_task_row(row, where, task) for row, where, task in read_rows(source)]


def parse_task_row(row: Mapping[str, Any], where: str, default_task: str) -> TaskRow:
    """Check one row of the task format; `where` names the file and line in errors."""
    answer = text_of(row, "answer", where)
    choices = _choices(row.get("choices"), where)
    if choices is not None and answer not in choices:
        raise DataError(
            f"{where}: the answer {answer!r} is not one of the choices {list(choices)}; "
            "it must equal one of them exactly"
        )
    references = row.get("references") or ()
    if isinstance(references, str) or not all(isinstance(r, str) for r in references):
        raise DataError(f"{where}: 'references' must be a list of texts, got {references!r}")
    return TaskRow(
        task=str(row.get("task") or default_task),
        id=str(row.get("id") or where),
        prompt=text_of(row, "prompt", where),
        choices=choices,
        answer=answer,
        references=tuple(references),
    )


def question(row: TaskRow | Mapping[str, Any], template: Template = "task") -> str:
    """The text in front of the answer. A chat template is no text template: use `chat.encode_chat`."""
    return _template(template).fill_prompt(_fields(row))


def answer_text(answer: str, template: Template = "task") -> str:
    """An answer (or a choice) as the continuation of a question, without the end token."""
    return _template(template).fill_completion({"answer": answer})


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """The non-empty text under `key`; numbers are taken as written, null and NaN are errors."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    elif isinstance(value, float) and value == value:
        value = repr(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} must be a non-empty text, got {row.get(key)!r}")
    return value


def _fields(row: TaskRow | Mapping[str, Any]) -> Mapping[str, Any]:
    return vars(row) if isinstance(row, TaskRow) else row


def _template(template: Template) -> TextTemplate:
    if isinstance(template, TextTemplate):
        return template
    if template == "task":
        return TASK_TEMPLATE
    raise DataError(
        f"template {template!r} has no text form; use 'task' or a prompt and completion text"
    )


def _choices(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(c, str) and c for c in value):
        raise DataError(f"{where}: 'choices' must be null or a list of texts, got {value!r}")
    if len(value) < 2 or len(set(value)) != len(value):
        raise DataError(f"{where}: 'choices' must be at least two different texts, got {value!r}")
    return tuple(value)
