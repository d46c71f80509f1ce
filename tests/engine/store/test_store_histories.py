"""The store without threads or disk, under random histories: reads end when the test says so, amid anything else.

What holds after every one of them: all who wait are served or told why not, with what their names stood for at some
moment since they asked; nothing is read again and again; no change is missed that would have let somebody go on.
LORAMUX_HISTORIES=5000 runs so many.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loramux.core.adapter import Adapter
from loramux.core.sites import find_sites
from loramux.engine import loader
from loramux.engine import names as names_of_store
from loramux.engine import store as stores
from loramux.engine.leases import Lease, Ticket
from loramux.engine.loader import Job
from pico import build_pico

SIZES = (1, 1, 2, 3, 5, 8, 13)
NUM = int(os.environ.get("LORAMUX_HISTORIES", "150"))
GONE, BROKEN = "gone", "broken"


@dataclass(frozen=True)
class FakeContent:
    digest: str
    nbytes: int
    num_slots: int
    slot_bytes: int
    packed: Any = None
    is_chunkable: bool = True
    is_shareable: bool = True


class Disk(dict[Path, tuple[int, FakeContent | None]]):
    """What each folder holds, None for what cannot be read, and which write that was."""

    num = 0

    def write(self, folder: Path, content: FakeContent | None) -> None:
        self.num += 1
        self[folder] = self.num, content

    def identity(self, folder: Path) -> Any:
        return (("file", self[folder][0], 0, 0, 0),)

    def read(self, job: Job, *_: Any) -> None:
        content = self[job.folder][1]
        if content is None:
            job.error, job.wrong_at = BROKEN, self.identity(job.folder)
        else:
            job.content, job.identity = content, self.identity(job.folder)


class Table:
    capacity = 8

    def put(self, *_: Any) -> None: ...
    def clear(self, *_: Any) -> None: ...


@dataclass
class HandLoader:
    """Reads at one `step` and says so at a later one."""

    disk: Disk
    done: Any
    job: Job | None = None
    is_read: bool = False
    num: int = 0

    def start(self, job: Job) -> None:
        assert self.job is None
        self.job, self.is_read = job, False

    def step(self) -> bool:
        job = self.job
        if job is None:
            return False
        if self.is_read:
            self.job, self.num = None, self.num + 1
            self.done(job)
        else:
            self.disk.read(job)
            self.is_read = True
        return True


@dataclass(eq=False)
class Waiter:
    """A ticket, and what each of its names stood for since it was asked for."""

    ticket: Ticket
    valid: dict[str, set[str]] = field(default_factory=dict)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    for module in (names_of_store, loader):
        monkeypatch.setattr(module, "identity_of", disk.identity)
    monkeypatch.setattr(stores, "run_job", disk.read)
    monkeypatch.setattr(stores, "content_of", lambda layout, adapter: adapter.content)
    return disk


@pytest.fixture(scope="module")
def model() -> Any:
    return build_pico("llama")


class History:
    def __init__(self, disk: Disk, model: Any, seed: int) -> None:
        self.disk, self.random = disk, random.Random(seed)
        draw = self.random.choice
        self.contents = [
            FakeContent(f"c{i}", draw(SIZES), draw((1, 1, 2, 3)), draw((1, 2, 4))) for i in range(8)
        ]
        self.store = stores.AdapterStore(
            model, find_sites(model), memory_bytes=draw((8, 13, 16, 26, 40)), slot_bytes=draw((2, 4, 8, 16)),
            max_slots=draw((1, 2, 3, 4, 6)), table=Table(),  # type: ignore[arg-type]
        )  # fmt: skip
        self.loader: Any = HandLoader(disk, self.store._intake._arrive)
        self.store._intake._loader = self.loader
        self.folders, self.names = [Path(f"f{i}") for i in range(7)], [f"n{i}" for i in range(7)]
        self.waiting: list[Waiter] = []
        self.leases: list[Lease] = []
        for folder in self.folders:
            disk.write(folder, draw(self.contents))
        for name in self.names:
            self.store.register(name, draw(self.folders))

    def known(self, most: int) -> list[str]:
        found = [name for name in self.names if name in self.store]
        return self.random.sample(found, min(len(found), most))

    def step(self) -> None:
        draw, turn = self.random.choice, self.random.random()
        if turn < 0.30 and len(self.waiting) < 12:
            mix = tuple((name, 1.0) for name in self.known(draw((1, 1, 1, 2, 3))))
            if mix:
                self.waiting.append(Waiter(self.store.want(mix), {name: set() for name, _ in mix}))
        elif turn < 0.55:
            self.admit()
        elif turn < 0.68 and self.leases:
            self.store.release(self.leases.pop(self.random.randrange(len(self.leases))))
        elif turn < 0.72:
            self.store.register(draw(self.names), draw(self.folders))
        elif turn < 0.76:
            self.disk.write(draw(self.folders), draw((*self.contents, None)))
        elif turn < 0.77:
            for name in self.known(1):
                self.store.remove(name)
        elif turn < 0.80 and self.waiting:
            gone = self.waiting.pop(self.random.randrange(len(self.waiting)))
            if draw((True, False)):
                self.store.drop(gone.ticket)  # otherwise it is forgotten
        elif turn < 0.82:
            self.store.prefetch(self.known(2))
        elif turn < 0.84 and self.leases:
            self.leases.append(self.store.share(draw(self.leases)))
        elif turn < 0.86:
            self.add()
        else:
            self.loader.step()
        for waiter in self.waiting:
            for name, valid in waiter.valid.items():
                valid.add(self.now(name))
        self.store.check_integrity()

    def add(self) -> None:
        source: Any = self.random.choice(self.folders)
        if self.random.random() < 0.2:
            source = Adapter.__new__(Adapter)
            source.content = self.random.choice(self.contents)
        with contextlib.suppress(ValueError):
            self.store.add(self.random.choice(self.names), source)

    def now(self, name: str) -> str:
        """What a name stands for."""
        entry = self.store._names.entries.get(name)
        if entry is None:
            return GONE
        if entry.folder is None:
            return str(entry.digest)
        content = self.disk[entry.folder][1]
        return BROKEN if content is None else content.digest

    def admit(self) -> int:
        """Ask for everybody, in some order; returns how many need not wait any more."""
        before = len(self.waiting)
        for waiter in self.random.sample(self.waiting, before):
            lease = None
            if waiter.ticket.state == "ready":
                lease = self.store.lease(waiter.ticket)
            if lease is not None:
                self.leases.append(lease)
                for part in lease.parts:
                    assert part.content.digest in waiter.valid[part.name], "served with old content"
            elif waiter.ticket.state == "failed":
                self.check(waiter)
            else:
                continue
            self.waiting.remove(waiter)
        return before - len(self.waiting)

    def check(self, waiter: Waiter) -> None:
        error = str(waiter.ticket.error)
        seen = set().union(*waiter.valid.values())
        assert (
            "raise " in error
            or ("was removed" in error and GONE in seen)
            or (error.endswith(BROKEN) and BROKEN in seen)
        ), (error, waiter.valid)

    def settle(self) -> None:
        """Everything that can happen without a lease's end happens."""
        most = self.loader.num + 40 + 20 * len(self.waiting)
        is_moving = True
        while is_moving:
            self.store.poll()
            is_moving = bool(self.admit())
            while self.loader.step():
                is_moving = True
            assert self.loader.num < most, "the same is read again and again"
        states = [waiter.ticket.state for waiter in self.waiting]
        self.store._intake._tried = None
        self.store.poll()
        again = [waiter.ticket.state for waiter in self.waiting]
        assert states == again and self.loader.job is None, "a change was missed"

    def drain(self) -> None:
        self.settle()
        while self.leases:
            self.store.release(self.leases.pop(self.random.randrange(len(self.leases))))
            self.settle()
        assert not self.waiting, [(w.ticket.mix, w.ticket.state) for w in self.waiting]


@pytest.fixture
def histories(disk: Disk, model: Any) -> Iterator[History]:
    return (History(disk, model, seed) for seed in range(NUM))


def test_after_any_history_nobody_waits_for_ever_or_is_given_what_is_no_more(
    histories: Iterator[History],
) -> None:
    for history in histories:
        for _ in range(history.random.choice((60, 200))):
            history.step()
            if history.random.random() < 0.02:
                history.settle()
        history.drain()
