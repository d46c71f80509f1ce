"""What a person sees while a suite runs, on standard error: a bar with the time left, a line for every row.

The time left is what finished rows took, by method, over what they cost in tokens; a token of a test costs one forward
pass, a token of training about three.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loramux.compare.plan import Item

TRAIN_COST = 3.2  # forward, backward to the activations, and the adapter's own
FIXED_SECONDS = 15.0  # imports, loading the base twice
Row = Mapping[str, Any]


def cost(item: Item) -> float:
    """In tokens of a forward pass."""
    return TRAIN_COST * item.tokens + item.search_tokens + item.test_tokens


class Clock:
    """Seconds of items that are still to come, learnt from rows. `speed`: seconds per token before there are any."""

    def __init__(self, speed: float | None = None):
        self.speed = speed
        self._seen: dict[str, list[float]] = {}

    def learn(self, item: Item, row: Row) -> None:
        if row.get("status") == "ok":
            sums = self._seen.setdefault(item.label, [0.0, 0.0])
            sums[0] += max(row["wall_seconds"] - FIXED_SECONDS, 0.1)
            sums[1] += cost(item)

    def seconds(self, items: Iterable[Item]) -> float | None:
        """None as long as nothing is known."""
        sums = list(self._seen.values())
        total = sum(tokens for _, tokens in sums)
        overall = sum(s for s, _ in sums) / total if total else self.speed
        if overall is None:
            return None
        result = 0.0
        for item in items:
            spent, tokens = self._seen.get(item.label, (0.0, 0.0))
            result += FIXED_SECONDS + cost(item) * (spent / tokens if tokens else overall)
        return result


class Progress:
    """Silent; counts nothing."""

    def begin(self, item: Item) -> None:
        """An item starts."""

    def done(self, row: Row) -> None:
        """A row was written."""


class Shown(Progress):
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(
        self, items: Sequence[Item], todo: Sequence[Item], rows: Mapping[str, Row], workers: int
    ):
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.items = {item.id: item for item in items}
        self.left = {item.id: item for item in todo}
        self.workers = workers
        self.clock = Clock()
        for item in items:
            if item.id in rows and item.id not in self.left:
                self.clock.learn(item, rows[item.id])
        self._bar: Any = None
        self._line: Any = None

    @contextmanager
    def drawn(self) -> Iterator[Progress]:
        if not self.console.is_terminal:
            yield self
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Bar(*columns, console=self.console) as self._bar:
            done = len(self.items) - len(self.left)
            self._line = self._bar.add_task(
                "comparing", total=len(self.items), completed=done, left=self._time_left()
            )
            yield self

    def begin(self, item: Item) -> None:
        if self._bar is not None:
            self._bar.update(self._line, description=item.title, left=self._time_left())

    def done(self, row: Row) -> None:
        item = self.left.pop(row["id"])
        self.clock.learn(item, row)
        text = f"{item.title}: {_outcome(row)}, {row['wall_seconds']:.0f} s"
        if self._bar is None:
            done = len(self.items) - len(self.left)
            left = self._time_left()
            sys.stderr.write(f"[{done}/{len(self.items)}] {text}{', ' if left else ''}{left}\n")
            sys.stderr.flush()
            return
        self.console.print(text, markup=False)
        self._bar.update(self._line, advance=1, left=self._time_left())

    def _time_left(self) -> str:
        if not self.left:
            return ""
        seconds = self.clock.seconds(self.left.values())
        return "" if seconds is None else f"{duration(seconds / self.workers)} left"


def _outcome(row: Row) -> str:
    if row["status"] != "ok":
        return f"failed ({row['reason']})"
    values = [score["value"] for score in row["scores"].values()]
    return f"{sum(values) / len(values):.3f}"


@contextmanager
def progress_of(
    show: bool,
    items: Sequence[Item],
    todo: Sequence[Item],
    rows: Mapping[str, Row],
    workers: int,
) -> Iterator[Progress]:
    if not show:
        yield Progress()
        return
    with Shown(items, todo, rows, workers).drawn() as shown:
        yield shown


def duration(seconds: float) -> str:
    """3 h 20 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
