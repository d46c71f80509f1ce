"""How results leave the command line: JSON for programs, tables for people, progress on standard error.

Why one place: with `--json -` standard output must hold one JSON document and nothing else, whatever a library
prints in between.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.errors import LoramuxError

JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the result as JSON; '-' is standard output."
    ),
]
STDOUT = "-"
PIPE_WIDTH = 160


@contextlib.contextmanager
def only_json(target: str | None) -> Iterator[None]:
    """While inside, what anything prints goes to standard error if standard output is for JSON."""
    if target == STDOUT:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    else:
        yield


def emit(result: Any, target: str | None, show: Callable[[Any], None]) -> None:
    """Write the JSON if it was asked for; show the result unless that took standard output."""
    if target == STDOUT:
        print(to_json(result), flush=True)
        return
    if target is not None:
        path = Path(target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(to_json(result) + "\n", encoding="utf-8")
        except OSError as error:
            raise LoramuxError(f"--json {target}: cannot be written ({error.strerror})") from None
    show(result)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; numbers are right-aligned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    numeric = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(columns))
    ]
    made = Table(title=title, title_justify="left")
    for name, is_number in zip(columns, numeric, strict=True):
        made.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        made.add_row(*(escape(_cell(value)) for value in row))
    # A file or a pipe has no width of its own: do not squeeze the table into 80 columns.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width).print(made)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
