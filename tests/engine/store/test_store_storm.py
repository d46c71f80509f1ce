"""The store under random histories: requests of all sizes come, wait and leave, names move; nobody is stuck."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from engine.folders import make_store, write_lora
from loramux.engine.content import Content
from loramux.engine.leases import Lease, Ticket
from loramux.engine.store import AdapterStore
from pico import build_pico

RANKS = (1, 1, 2, 2, 3, 5, 8, 13)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """Contents of very different sizes, by the name of their folder."""
    root, model = tmp_path_factory.mktemp("storm"), build_pico("llama")
    store = make_store(model)
    folders = [write_lora(model, root / str(i), i, r=r) for i, r in enumerate(RANKS)]
    return {folder.name: store._read(folder) for folder in folders}


class Storm:
    """Random requests against a store whose folders are read in an instant, or in a few steps of the others."""

    def __init__(self, contents: dict[str, Content], seed: int, root: Path):
        self.random = random.Random(seed)
        self.contents = contents
        largest = max(content.nbytes for content in contents.values())
        memory = self.random.choice([1, 2, 3]) * largest
        self.store: AdapterStore = make_store(
            build_pico("llama"),
            memory=memory,
            slots=self.random.choice([1, 2, 4]),
            slot_bytes=self.random.choice([memory, largest]),
        )
        self.slowness = self.random.choice([0.0, 0.0, 0.005])
        self.store._intake._loader._read = self.read
        self.folders = [root / name for name in contents]
        self.names = [f"n{i}" for i in range(len(contents))]
        for name in self.names:
            self.register(name)
        self.tickets: list[Ticket] = []
        self.leases: list[Lease] = []
        self.failed: list[Ticket] = []

    def read(self, folder: Path) -> Content:
        time.sleep(self.slowness)
        return self.contents[folder.name]

    def register(self, name: str) -> None:
        self.store.register(name, self.random.choice(self.folders))

    def step(self) -> None:
        turn = self.random.random()
        if turn < 0.4 and len(self.tickets) < 12:
            chosen = self.random.sample(self.names, self.random.choice([1, 1, 1, 2, 3]))
            self.tickets.append(self.store.want(tuple((name, 1.0) for name in chosen)))
        elif turn < 0.7:
            self.admit()
        elif turn < 0.9 and self.leases:
            self.store.release(self.leases.pop(self.random.randrange(len(self.leases))))
        elif turn < 0.93:
            self.register(self.random.choice(self.names))
        elif turn < 0.95 and self.tickets:
            self.store.drop(self.tickets.pop(self.random.randrange(len(self.tickets))))
        elif turn < 0.96:
            self.store.prefetch(self.random.sample(self.names, 2))
        else:
            self.store.wait(0.002)
        self.store.check_integrity()

    def admit(self) -> None:
        """As a scheduler would: ask for everybody, in some order."""
        for ticket in self.random.sample(self.tickets, len(self.tickets)):
            if ticket.state == "failed":
                self.tickets.remove(ticket)
                self.failed.append(ticket)
            elif ticket.state == "ready":
                lease = self.store.lease(ticket)
                if lease is not None:
                    self.tickets.remove(ticket)
                    self.leases.append(lease)

    def drain(self) -> None:
        """Nobody new comes: everyone who waits must be served while answers end."""
        for _ in range(200):
            self.admit()
            if self.leases:
                self.store.release(self.leases.pop(0))
            elif self.tickets:
                self.store.wait(0.2)
            else:
                return
        states = [(ticket.mix, ticket.state) for ticket in self.tickets]
        raise AssertionError(f"still waiting: {states}, {self.store.stats()}")


@pytest.mark.parametrize("seed", range(12))
def test_whoever_waits_is_served_or_told_why_not(
    seed: int, contents: dict[str, Content], tmp_path: Path
) -> None:
    storm = Storm(contents, seed, tmp_path)
    for _ in range(300):
        storm.step()
    storm.drain()
    assert all("raise " in str(ticket.error) for ticket in storm.failed)
    stats = storm.store.stats()
    assert (stats.num_leases, stats.num_waiting, stats.num_slots_pinned) == (0, 0, 0)
    storm.store.check_integrity()
    storm.store.close()
