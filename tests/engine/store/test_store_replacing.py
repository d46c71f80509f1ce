"""Folders and names that change: later requests see it, leases under way never do."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from engine.folders import (
    WEIGHTS,
    Folders,
    Gate,
    Stores,
    first_row,
    lease_of,
    row_of,
    size_of,
    wait_for,
    write_lora,
)
from loramux.engine.content import Content
from loramux.engine.sources import TICK_S, identity_of, settle
from loramux.engine.store import AdapterStore
from pico import build_pico


def test_a_folder_replaced_on_disk_is_noticed_and_a_running_lease_keeps_what_it_had(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    store.register("a", folder)
    before = lease_of(store, "a")
    write_lora(build_pico("llama"), folder, seed=1)
    after = lease_of(store, "a")
    assert before.answered != after.answered
    assert torch.equal(row_of(store, before), first_row(lora(0)))
    assert torch.equal(row_of(store, after), first_row(lora(1)))
    store.check_integrity()
    store.release(before)
    assert store.stats().num_contents == 1, "nothing stands for the old content any more"
    store.release(after)


def test_a_file_of_the_same_size_with_its_old_time_set_back_is_noticed(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    store.register("a", folder)
    store.release(lease_of(store, "a"))
    info = os.stat(folder / WEIGHTS)
    with open(folder / WEIGHTS, "r+b") as file:  # the same inode, too
        file.write((lora(1) / WEIGHTS).read_bytes())
    os.utime(folder / WEIGHTS, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert os.stat(folder / WEIGHTS).st_size == info.st_size
    lease = lease_of(store, "a")
    assert torch.equal(row_of(store, lease), first_row(lora(1)))
    store.release(lease)


def test_an_adapter_replaced_while_it_was_read_is_read_again(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    inner, reads = store._intake._loader._read, []

    def read(path: Path) -> Content:
        content = inner(path)
        if not reads:
            write_lora(build_pico("llama"), folder, seed=1)
        reads.append(content.digest)
        return content

    store._intake._loader._read = read
    store.register("a", folder)
    lease = lease_of(store, "a")
    assert len(reads) == 2
    assert torch.equal(row_of(store, lease), first_row(lora(1)))
    store.release(lease)


def test_a_folder_replaced_while_it_is_added_is_read_again(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    inner, reads = store._read, []

    def read(path: Path) -> Content:
        content = inner(path)
        if not reads:
            write_lora(build_pico("llama"), folder, seed=1)
        reads.append(content.digest)
        return content

    store._read = read  # type: ignore[method-assign]
    assert store.add("a", folder) == reads[1] != reads[0]


def test_a_folder_that_never_holds_still_is_refused(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    inner = store._read

    def read(path: Path) -> Content:
        content = inner(path)
        write_lora(build_pico("llama"), folder, seed=1)
        return content

    store._read = read  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"changed each of \d+ times it was read"):
        store.add("a", folder)


def test_after_settling_every_later_write_shows_in_the_identity(
    lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    for turn in range(20):
        with open(folder / WEIGHTS, "r+b") as file:
            file.write(bytes([turn]))
        before = identity_of(folder)
        settle(before)
        assert time.time() >= max(entry[4] for entry in before) / 1e9 + TICK_S - 0.001
        with open(folder / WEIGHTS, "r+b") as file:
            file.write(bytes([turn + 1]))
        assert identity_of(folder) != before


def test_a_change_between_reading_and_taking_in_is_noticed(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    store.register("a", folder)
    early = store.want((("a", 1.0),))
    assert store.wait(20)
    write_lora(build_pico("llama"), folder, seed=1)
    late = lease_of(store, "a")
    assert torch.equal(row_of(store, late), first_row(lora(1)))
    assert wait_for(store, early) == "ready"
    store.release(late)


def test_a_change_is_noticed_though_another_name_brings_what_the_folder_held(
    make: Stores, lora: Folders, tmp_path: Path
) -> None:
    """Regression: a folder that was to be read anyway was not looked at, and the old content served a new request."""
    store = make(memory=size_of(make(), lora(0)))
    folder = shutil.copytree(lora(0), tmp_path / "a")
    store.register("a", folder)
    store.register("same", lora(0))
    store.register("b", lora(1))
    for name in ("a", "b"):  # what `a` held is gone
        store.release(lease_of(store, name))
    gate = Gate(store)
    early, _first = store.want((("same", 1.0),)), store.want((("a", 1.0),))
    write_lora(build_pico("llama"), folder, seed=2)
    late = store.want((("a", 1.0),))
    gate.go.set()
    assert wait_for(store, early) == "ready"
    store.drop(early)
    assert wait_for(store, late) == "ready"
    lease = store.lease(late)
    assert lease is not None
    assert torch.equal(row_of(store, lease), first_row(folder))
    store.release(lease)


def test_a_name_given_to_another_folder_serves_later_requests_from_there(
    store: AdapterStore, lora: Folders
) -> None:
    store.register("a", lora(0))
    before = lease_of(store, "a")
    store.register("a", lora(1))
    after = lease_of(store, "a")
    assert torch.equal(row_of(store, before), first_row(lora(0)))
    assert torch.equal(row_of(store, after), first_row(lora(1)))
    store.release(before)
    store.release(after)
    assert store.stats().num_contents == 1


def test_replaced_while_it_waits_a_request_gets_the_new_content(
    store: AdapterStore, lora: Folders
) -> None:
    gate = Gate(store)
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert gate.begun.wait(20)
    store.register("a", lora(1))
    gate.go.set()
    assert wait_for(store, ticket) == "ready"
    lease = store.lease(ticket)
    assert lease is not None
    assert torch.equal(row_of(store, lease), first_row(lora(1)))
    store.release(lease)


def test_a_removed_name_lets_leases_finish_and_fails_those_who_wait(
    store: AdapterStore, lora: Folders
) -> None:
    store.register("a", lora(0))
    lease, waiting = lease_of(store, "a"), store.want((("a", 1.0),))
    store.remove("a")
    assert waiting.state == "failed"
    assert waiting.error == "adapter 'a' was removed while a request was waiting for it"
    assert torch.equal(row_of(store, lease), first_row(lora(0)))
    store.check_integrity()
    store.release(lease)
    assert store.stats().memory_bytes == store.stats().num_slots_used == 0
    with pytest.raises(ValueError, match="no adapter is named 'a'"):
        store.remove("a")


def test_a_shared_lease_is_of_the_same_content_though_the_name_moved(
    store: AdapterStore, lora: Folders
) -> None:
    store.register("a", lora(0))
    first = lease_of(store, "a")
    store.register("a", lora(1))
    second = store.share(first)
    assert second.parts == first.parts
    store.release(first)
    store.release(first)  # a second time: nothing happens
    store.check_integrity()
    assert torch.equal(row_of(store, second), first_row(lora(0)))
    store.release(second)
    assert store.stats().num_slots_pinned == 0
