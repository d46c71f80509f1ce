"""Budgets of memory and slots: who has to go, who never goes, and what is refused with which numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from engine.folders import (
    CONFIG,
    WEIGHTS,
    Folders,
    Gate,
    Stores,
    first_row,
    lease_of,
    row_of,
    size_of,
    truncate,
    wait_for,
    write_lora,
)
from loramux.engine.store import AdapterStore
from pico import build_pico


def test_memory_keeps_within_its_budget_and_forgets_what_was_unused_longest(
    make: Stores, lora: Folders
) -> None:
    store = make(memory=2 * size_of(make(), lora(0)))
    for i in range(3):
        store.register(f"a{i}", lora(i))
    for name in ("a0", "a1", "a0", "a2"):
        store.release(lease_of(store, name))
        store.check_integrity()
    assert store.stats().num_loads == 3
    assert store.stats().memory_bytes <= store.stats().memory_limit
    assert store.want((("a0", 1.0),)).state == "ready"
    assert store.want((("a1", 1.0),)).state == "loading"


def test_what_is_leased_is_never_evicted_from_memory(make: Stores, lora: Folders) -> None:
    store = make(memory=2 * size_of(make(), lora(0)))
    for i in range(4):
        store.register(f"a{i}", lora(i))
    held = [lease_of(store, "a0"), lease_of(store, "a1")]
    ticket, younger = store.want((("a2", 1.0),)), store.want((("a3", 1.0),))
    assert not ticket.is_crowded
    assert wait_for(store, ticket) == "loading"
    assert ticket.is_crowded
    assert not younger.is_crowded
    assert store.lease(ticket) is None
    store.check_integrity()
    assert torch.equal(row_of(store, held[0]), first_row(lora(0)))
    store.release(held.pop())
    assert wait_for(store, ticket) == "ready"
    assert torch.equal(row_of(store, held[0]), first_row(lora(0)))
    store.release(held.pop())


def test_what_an_older_request_waits_for_is_not_evicted_for_a_younger(
    make: Stores, lora: Folders
) -> None:
    store = make(memory=2 * size_of(make(), lora(0)))
    for i in range(4):
        store.register(f"a{i}", lora(i))
    old = [store.want(((f"a{i}", 1.0),)) for i in range(2)]
    young = store.want((("a2", 1.0),))
    assert [wait_for(store, ticket) for ticket in old] == ["ready", "ready"]
    assert wait_for(store, young) == "loading"
    assert [ticket.state for ticket in old] == ["ready", "ready"]
    lease = store.lease(old[0])
    assert lease is not None
    store.release(lease)
    assert wait_for(store, young) == "ready"
    assert old[1].state == "ready"


def test_an_adapter_that_finds_no_room_does_not_keep_an_older_request_waiting(
    make: Stores, lora: Folders
) -> None:
    store = make(memory=2 * size_of(make(), lora(0)))
    for i in range(3):
        store.register(f"a{i}", lora(i))
    lease = lease_of(store, "a0")
    first, second = store.want((("a0", 1.0),)), store.want((("a1", 1.0),))
    assert (first.state, wait_for(store, second)) == ("ready", "ready")
    third = store.want((("a2", 1.0),))
    assert wait_for(store, third) == "loading"  # it was read, and there is no room
    store.register("a0", lora(3))  # what the first request waits for must be read anew
    assert wait_for(store, first) == "ready"
    assert wait_for(store, second) == "loading"
    store.release(lease)
    assert wait_for(store, second) == "ready"


def test_what_was_read_for_a_name_that_moved_on_stands_in_nobodys_way(
    make: Stores, lora: Folders, tmp_path: Path
) -> None:
    """Regression: it stayed at the door for ever where it and the rest of its own request do not fit together."""
    small, large = lora(0), write_lora(build_pico("llama"), tmp_path / "large", r=8)
    store = make(memory=size_of(make(), large))
    store.register("a", small)
    store.register("b", large)
    assert wait_for(store, store.want((("a", 1.0),))) == "ready"
    gate = Gate(store)
    ticket = store.want((("a", 1.0), ("b", 1.0)))
    assert gate.begun.wait(20)
    store.register("b", lora(1))
    gate.go.set()
    assert wait_for(store, ticket) == "ready"


def test_what_is_wrong_with_a_folder_fails_nobody_once_the_name_moved_on(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    shutil.copytree(lora(0), tmp_path / "broken")
    truncate(tmp_path / "broken")
    store.register("a", tmp_path / "broken")
    gate = Gate(store)
    ticket = store.want((("a", 1.0),))
    assert gate.begun.wait(20)
    store.register("a", lora(1))
    gate.go.set()
    assert store.wait(20)  # the error is there before anybody asks
    assert wait_for(store, ticket) == "ready"


def test_what_nobody_waits_for_any_more_leaves_the_door(make: Stores, lora: Folders) -> None:
    store = make(memory=size_of(make(), lora(0)))
    for i in range(2):
        store.register(f"a{i}", lora(i))
    lease, gone = lease_of(store, "a0"), store.want((("a1", 1.0),))
    assert wait_for(store, gone) == "loading"
    assert gone.is_crowded
    store.drop(gone)
    again = store.want((("a0", 1.0),))
    assert again.state == "ready"
    assert not store._intake.jobs
    again = store.want((("a1", 1.0),))
    store.prefetch(["a1"])  # whether or not anybody waits
    assert wait_for(store, again) == "loading"
    store.drop(again)
    store.release(lease)
    store.poll()
    assert store.want((("a1", 1.0),)).state == "ready"


def test_a_prefetch_in_the_way_of_a_request_is_not_read_again_in_vain(
    make: Stores, lora: Folders
) -> None:
    store = make(memory=size_of(make(), lora(0)))
    for i in range(3):
        store.register(f"a{i}", lora(i))
    lease = lease_of(store, "a0")
    gate = Gate(store)
    gate.go.set()
    store.prefetch(["a1"])
    assert store.wait(20)
    store.poll()  # there is no room for it
    ticket = store.want((("a2", 1.0),))
    assert wait_for(store, ticket) == "loading"
    store.release(lease)
    assert wait_for(store, ticket) == "ready"
    assert not store._intake.jobs
    assert gate.read == [lora(1).name, lora(2).name]


def test_the_search_for_room_is_not_repeated_for_everyone_who_asks(
    make: Stores, lora: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(memory=size_of(make(), lora(0)))
    for i in range(2):
        store.register(f"a{i}", lora(i))
    lease = lease_of(store, "a0")
    crowd = [store.want((("a1", 1.0),)) for _ in range(20)]
    assert wait_for(store, crowd[-1]) == "loading"
    searches = []
    monkeypatch.setattr(store.tiers, "keep", lambda *_: searches.append(1))
    for _ in range(5):
        assert {ticket.state for ticket in crowd} == {"loading"}
    assert len(searches) <= 1
    monkeypatch.undo()
    store.release(lease)
    assert wait_for(store, crowd[0]) == "ready"


def test_content_that_has_changed_on_disk_makes_room_for_what_replaced_it(
    make: Stores, lora: Folders, tmp_path: Path
) -> None:
    store = make(memory=size_of(make(), lora(0)))
    folder = shutil.copytree(lora(0), tmp_path / "a")
    store.register("a", folder)
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "ready"
    write_lora(build_pico("llama"), folder, seed=1)
    assert wait_for(store, store.want((("a", 1.0),))) == "ready"
    assert ticket.state == "ready"


def test_an_adapter_larger_than_memory_is_refused_with_the_numbers(
    make: Stores, lora: Folders
) -> None:
    size = size_of(make(), lora(0))
    store = make(memory=size - 1)
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "failed"
    assert ticket.error is not None and f"{size - 1:,}; raise adapter_memory" in ticket.error
    with pytest.raises(ValueError, match="raise adapter_memory"):
        store.add("a", lora(0))
    store.check_integrity()


def test_a_file_larger_than_memory_is_refused_unread(make: Stores, tmp_path: Path) -> None:
    store = make(memory=10_000)
    store._intake._loader._read = pytest.fail
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG).write_text("{}")
    with open(tmp_path / "a" / WEIGHTS, "wb") as file:
        file.truncate(2**40)
    store.register("a", tmp_path / "a")
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "failed"
    assert (
        ticket.error is not None and "1,099,511,627,776 bytes in files of tensors" in ticket.error
    )


def test_an_adapter_larger_than_the_slot_tier_is_refused_with_the_numbers(
    make: Stores, lora: Folders
) -> None:
    store = make(slot_bytes=100)
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "failed"
    assert ticket.error is not None and "the budget is 100; raise slot_memory" in ticket.error


def test_a_mix_that_never_fits_is_refused_and_its_parts_are_let_go(
    make: Stores, lora: Folders
) -> None:
    mix = (("a0", 0.5), ("a1", 0.5))
    size = size_of(make(), lora(0))
    for budgets, reason in (
        ({"memory": 2 * size - 1}, "takes .* bytes, the budget .*raise adapter_memory"),
        ({"slots": 1}, "it needs 2 adapter slots.*raise max_slots"),
        ({"slot_bytes": size + 1}, "raise slot_memory"),
    ):
        store = make(**budgets)
        for i in range(3):
            store.register(f"a{i}", lora(i))
        ticket, other = store.want(mix), store.want((("a2", 1.0),))
        assert wait_for(store, ticket) == "failed", budgets
        with pytest.raises(ValueError, match=reason):
            store.lease(ticket)
        assert wait_for(store, other) == "ready", budgets


def test_an_adapter_that_the_slot_table_refuses_fails_its_request(
    store: AdapterStore, lora: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(slots: object, packed: object) -> None:
        raise ValueError("rank 512 is above the table's max_rank 256")

    monkeypatch.setattr(store.slots.table, "put", refuse)
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "ready"
    assert store.lease(ticket) is None
    assert ticket.state == "failed"
    assert ticket.error == "'a': rank 512 is above the table's max_rank 256"
    with pytest.raises(ValueError, match="rank 512"):
        store.lease((("a", 1.0),))
    store.check_integrity()


def test_with_all_slots_pinned_a_lease_has_to_wait(make: Stores, lora: Folders) -> None:
    store = make(slots=2)
    for i in range(3):
        store.register(f"a{i}", lora(i))
    held = [lease_of(store, "a0"), lease_of(store, "a1")]
    ticket = store.want((("a2", 1.0),))
    assert wait_for(store, ticket) == "ready"
    assert store.lease(ticket) is None
    store.release(held.pop(0))
    lease = store.lease(ticket)
    assert lease is not None
    assert torch.equal(row_of(store, held[0]), first_row(lora(1)))
    for own in (lease, *held):
        store.release(own)
