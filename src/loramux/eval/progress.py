"""The progress bar of an evaluation, on standard error: standard output belongs to results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def rows_bar(show: bool, title: str, total: int) -> Iterator[Callable[[str], Advance]]:
    """Gives, per task, a function that moves the bar; the bar is drawn on standard error."""
    if not show:
        yield lambda _task: lambda _rows: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(title, total=total)

        def step(task: str) -> Advance:
            bar.update(line, description=f"{title} {task}")
            return lambda rows: bar.advance(line, rows)

        yield step
