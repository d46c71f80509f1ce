"""Runs a suite: the items that have no row yet, one after the other or a few at a time, each in its own process.

The folder: suite.json, rows.jsonl, work/ID/ (adapter, history and log of every item), and what `write_results` makes
of the rows. Stopped by whatever means, the same call goes on: an item that was under way is begun again, so that its
times are of one piece. A failure is a row too, with the reason, and the items that do not need it go on.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramux.compare.plan import Item, make_plan
from loramux.compare.processes import ItemError, Processes
from loramux.compare.progress import progress_of
from loramux.compare.rows import RowStore, locked
from loramux.compare.schema import Suite
from loramux.compare.select import select
from loramux.formats.files import check_place

OK, FAILED = "ok", "failed"
WORK, SUITE = "work", "suite.json"
REASON_LENGTH = 600
Row = dict[str, Any]
CarryOut = Callable[[Item, Path, Mapping[str, Path], float | None], dict[str, Any]]


def run_suite(
    suite: Suite,
    out: Path,
    *,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    workers: int = 1,
    progress: bool = True,
    carry_out: CarryOut | None = None,
) -> dict[str, Any]:
    """Make every row that is missing, then the results over all rows of the suite.

    only: words that name parts, methods, tasks or `seed=N`; nothing else is run. retry_failed: failures of earlier
    runs are tried again. workers: items under way at a time. carry_out replaces the process that does an item.
    Raises SuiteError before anything runs where the suite cannot be met.
    """
    from loramux.compare.summary import write_results

    out = Path(out)
    check_place(out / SUITE if out.exists() else out)
    plan = make_plan(suite)
    chosen = select(plan.items, only)
    with locked(out):
        _note(suite, out)
        store = RowStore(out)
        rows = store.read()
        todo = [item for item in chosen if not _is_done(rows.get(item.id), retry_failed)]
        folders = {item.id: out / WORK / item.id for item in plan.items}
        with (
            progress_of(progress, chosen, todo, rows, workers) as shown,
            _ended_by_signals(),
            Processes() as processes,
        ):
            run = _Run(store, rows, folders, shown, carry_out or processes, suite.limit_minutes)
            run.all(todo, workers)
        return write_results(suite, plan, store.read(), out)


def results(suite: Suite, out: Path) -> dict[str, Any]:
    """The results over the rows that are there; nothing is run and nothing is written."""
    from loramux.compare.summary import summarise

    return summarise(suite, make_plan(suite), RowStore(Path(out)).read())


class _Run:
    """Hands items to workers as soon as what they need is there; only this thread writes rows."""

    def __init__(
        self,
        store: RowStore,
        rows: dict[str, Row],
        folders: Mapping[str, Path],
        shown: Any,
        carry_out: CarryOut,
        limit_minutes: float | None,
    ):
        self.store, self.rows, self.folders, self.shown = store, rows, folders, shown
        self.carry_out = carry_out
        self.limit = None if limit_minutes is None else 60 * limit_minutes

    def all(self, todo: Sequence[Item], workers: int) -> None:
        waiting = list(todo)
        under_way: dict[Future[Row], Item] = {}
        pool = ThreadPoolExecutor(max_workers=workers)
        try:
            while waiting or under_way:
                while len(under_way) < workers and (item := self._next(waiting, under_way)):
                    waiting.remove(item)
                    self.shown.begin(item)
                    under_way[pool.submit(self._do, item)] = item
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    del under_way[future]
                    self._keep(future.result())
        finally:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # what is under way ends with its process

    def _next(self, waiting: Sequence[Item], under_way: Mapping[Any, Item]) -> Item | None:
        """The first item whose needs are met, or can no longer be."""
        pending = {item.id for item in (*waiting, *under_way.values())}
        return next((i for i in waiting if not pending.intersection(i.needs)), None)

    def _do(self, item: Item) -> Row:
        start = time.perf_counter()
        lacking = [need for need in item.needs if self.rows.get(need, {}).get("status") != OK]
        try:
            if lacking:
                raise ItemError(f"needs the adapters of {lacking}, whose training failed")
            folder = self.folders[item.id]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            needs = {need: self.folders[need] for need in item.needs}
            found = {"status": OK, **self.carry_out(item, folder, needs, self.limit)}
        except (ItemError, ValueError, RuntimeError, OSError) as error:
            found = {"status": FAILED, "reason": str(error)[:REASON_LENGTH]}
        about = {"id": item.id, "part": item.part, "method": item.label, "task": item.task}
        seconds = round(time.perf_counter() - start, 2)
        return {**about, "seed": item.seed, **found, "wall_seconds": seconds}

    def _keep(self, row: Row) -> None:
        self.store.append(row)
        self.rows[row["id"]] = row
        self.shown.done(row)


def _is_done(row: Row | None, retry_failed: bool) -> bool:
    return row is not None and not (retry_failed and row["status"] == FAILED)


def _note(suite: Suite, out: Path) -> None:
    from loramux.formats.jsonio import write_json

    write_json(out / SUITE, suite.model_dump(mode="json"))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM is an interrupt as Ctrl-C is: processes are ended, no half row is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
