"""The progress bar of a measurement, on standard error.

Why it is redrawn by hand: a thread that redraws while the clock runs would be billed to whatever is being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]
Begin = Callable[[str, int], Advance]
"""Starts a line with a title and a total, and gives what moves it by one."""


def silent(_title: str, _total: int) -> Advance:
    return lambda: None


@contextmanager
def bars(show: bool) -> Iterator[Begin]:
    if not show:
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:

        def begin(title: str, total: int) -> Advance:
            line = bar.add_task(title, total=total)
            bar.refresh()

            def advance() -> None:
                bar.advance(line)
                bar.refresh()

            return advance

        yield begin
