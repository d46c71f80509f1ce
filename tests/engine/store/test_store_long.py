"""The store for long: memory stays flat, versions whole, and its thread ends when it should."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.folders import (
    Folders,
    Gate,
    Stores,
    first_row,
    lease_of,
    row_of,
    size_of,
    write_lora,
)
from loramux.engine.content import Content
from loramux.engine.store import AdapterStore, Lease
from pico import build_pico


def test_hundreds_of_loads_and_unloads_leave_memory_flat(make: Stores, lora: Folders) -> None:
    store = make(memory=3 * size_of(make(), lora(0)), slots=2)
    for i in range(6):
        store.register(f"a{i}", lora(i))

    contents: weakref.WeakSet[Content] = weakref.WeakSet()

    def cycle(times: int) -> int:
        for turn in range(times):
            lease = lease_of(store, f"a{turn % 6}")
            contents.add(lease.parts[0].content)
            store.release(lease)
            assert len(contents) <= 4, "a content outlives its place in memory"
        del lease
        store.check_integrity()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = cycle(100)
        after = cycle(300)
    finally:
        tracemalloc.stop()
    # Far below one content (3 kB) per cycle; what is left are the interpreter's own caches.
    assert after - before < 100_000, f"{after - before:,} bytes more after 300 cycles"
    assert store.stats().num_loads > 300


def test_replaced_in_place_again_and_again_every_lease_is_of_one_version(
    make: Stores, tmp_path: Path
) -> None:
    """A writer replaces folders under the store's feet; every content is whole, and no older than its request."""
    store, model = make(slots=4), build_pico("llama")
    folders = [write_lora(model, tmp_path / f"a{i}", seed=1000 * i) for i in range(3)]
    newest = [1000 * i for i in range(3)]
    rows = {seed: first_row(folder) for seed, folder in zip(newest, folders, strict=True)}
    stop = threading.Event()

    def write() -> None:
        for turn in range(1, 40):
            number = turn % 3
            seed = 1000 * number + turn
            spare = write_lora(model, tmp_path / "spare" / str(turn), seed)
            rows[seed] = first_row(spare)
            write_lora(model, folders[number], seed)
            newest[number] = seed
            if stop.wait(0.02):
                return

    for i, folder in enumerate(folders):
        store.register(f"a{i}", folder)
    writer = threading.Thread(target=write)
    writer.start()
    held: list[tuple[Lease, Tensor]] = []
    try:
        turn = 0
        while writer.is_alive() or turn < 60:
            number, turn = turn % 3, turn + 1
            least = newest[number]
            lease = lease_of(store, f"a{number}")
            row = row_of(store, lease).clone()
            seed = next(s for s, known in list(rows.items()) if torch.equal(known, row))
            assert least <= seed < 1000 * (number + 1), (number, least, seed)
            held.append((lease, row))
            if len(held) > 3:
                old, was = held.pop(0)
                assert torch.equal(row_of(store, old), was)
                store.release(old)
            store.check_integrity()
    finally:
        stop.set()
        writer.join()
    for lease, _ in held:
        store.release(lease)
    assert store.stats().num_slots_pinned == store.stats().num_leases == 0


def test_a_closed_store_fails_those_who_wait_and_reads_nothing_more(
    make: Stores, lora: Folders
) -> None:
    store = make()
    for i in range(2):
        store.register(f"a{i}", lora(i))
    lease = lease_of(store, "a0")
    store.close()
    ticket = store.want((("a1", 1.0),))
    assert ticket.state == "failed"
    assert ticket.error is not None and "closed" in ticket.error
    assert torch.equal(row_of(store, lease), first_row(lora(0)))
    store.release(lease)
    store.close()


def test_closing_while_an_adapter_is_read_waits_for_it(store: AdapterStore, lora: Folders) -> None:
    gate = Gate(store)
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert gate.begun.wait(20)
    closer = threading.Thread(target=store.close)
    closer.start()
    time.sleep(0.02)
    assert closer.is_alive()
    gate.go.set()
    closer.join(20)
    assert not closer.is_alive()
    assert ticket.state == "ready"


def test_the_loader_ends_when_it_has_had_nothing_to_do(
    store: AdapterStore, lora: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.engine.loader.IDLE_S", 0.01)
    store.register("a", lora(0))
    store.release(lease_of(store, "a"))
    thread = store._intake._loader._thread
    if thread is not None:
        thread.join(20)
    assert store._intake._loader._thread is None
    store.register("b", lora(1))
    store.release(lease_of(store, "b"))
