"""Names of the store: registered for nothing, given from folders and from memory, taken back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.folders import (
    Folders,
    Stores,
    first_row,
    lease_of,
    row_of,
    size_of,
    trained,
    truncate,
    wait_for,
    write_lora,
)
from loramux.engine.store import AdapterStore
from pico import build_pico


def test_ten_thousand_names_are_registered_without_a_look_at_the_disk(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the disk was touched")

    for name in ("stat", "lstat", "open", "listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    for i in range(10_000):
        store.register(f"tenant-{i}", f"/nowhere/{i}")
    assert store.stats().num_names == 10_000
    assert store.stats().num_contents == 0


def test_a_leased_adapter_sits_in_its_slots(store: AdapterStore, lora: Folders) -> None:
    store.register("a", lora(0))
    lease = lease_of(store, "a")
    (part,) = lease.parts
    assert torch.equal(row_of(store, lease), first_row(lora(0)))
    assert lease.answered == (("a", part.content.digest, 1.0),)
    assert lease.is_chunkable and lease.is_shareable
    store.release(lease)


def test_a_request_for_the_base_needs_nothing(store: AdapterStore) -> None:
    ticket = store.want(())
    assert ticket.state == "ready"
    lease = store.lease(ticket)
    assert lease is not None
    assert lease.parts == ()
    store.release(lease)


def test_an_unknown_name_is_refused_with_the_nearest(store: AdapterStore) -> None:
    store.register("banking", "/nowhere")
    with pytest.raises(ValueError, match="no adapter is named 'bankin'; did you mean 'banking'"):
        store.want((("bankin", 1.0),))


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x"])
def test_names_that_cannot_be_stored_are_refused(store: AdapterStore, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an adapter"):
        store.register(name, "/nowhere")
    with pytest.raises(ValueError, match="cannot name an adapter"):
        store.add(name, "/nowhere")


def test_two_names_with_one_content_share_memory_and_slots(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    store.register("a", lora(0))
    store.register("b", shutil.copytree(lora(0), tmp_path / "copy"))
    first, second = lease_of(store, "a"), lease_of(store, "b")
    assert first.parts[0].slots == second.parts[0].slots
    assert store.stats().num_contents == 1
    assert store.stats().num_slots_used == 1
    store.release(first)
    store.check_integrity()
    assert store.stats().num_slots_pinned == 1
    store.release(second)


def test_a_weighted_mix_leases_every_part(store: AdapterStore, lora: Folders) -> None:
    for i in range(3):
        store.register(f"a{i}", lora(i))
    lease = lease_of(store, ("a2", 0.5), ("a0", 0.25), ("a1", -1.0))
    assert [(part.name, part.weight) for part in lease.parts] == [
        ("a2", 0.5), ("a0", 0.25), ("a1", -1.0),
    ]  # fmt: skip
    assert len({part.slots.start for part in lease.parts}) == 3
    store.release(lease)


def test_an_adapter_given_from_memory_is_a_copy_and_never_evicted(
    make: Stores, lora: Folders
) -> None:
    handle = trained(build_pico("llama"))
    adapter = handle.adapters["default"]
    size = size_of(make(), handle.save(lora(0).parent / "given"))
    store = make(memory=size + size_of(make(), lora(0)))
    digest = store.add("given", adapter)
    store.register("a", lora(0))
    store.register("b", lora(1))
    for name in ("a", "b", "a"):
        store.release(lease_of(store, name))
    lease = lease_of(store, "given")
    assert lease.answered == (("given", digest, 1.0),)
    store.release(lease)
    assert store.stats().num_loads == 3
    store.remove("given")
    assert digest not in store.memory.residents


def test_what_is_neither_a_folder_nor_an_adapter_is_refused(store: AdapterStore) -> None:
    handle: Any = trained(build_pico("llama"))
    with pytest.raises(ValueError, match=r"handle.adapters\[NAME\]\), got .*Handle"):
        store.add("given", handle)


def test_an_adapter_given_from_memory_is_refused_where_there_is_no_room(
    make: Stores, lora: Folders
) -> None:
    store = make(memory=size_of(make(), lora(0)))
    store.register("a", lora(0))
    lease = lease_of(store, "a")
    handle = trained(build_pico("llama"), r=1, target_modules=["v_proj"])
    adapter = handle.adapters["default"]
    with pytest.raises(ValueError, match=r"takes [\d,]+ bytes; of the [\d,]+ .* 0 are free"):
        store.add("given", adapter)
    assert "given" not in store
    store.release(lease)
    store.add("given", adapter)


def test_an_adapter_that_finds_no_room_beside_given_ones_is_refused_with_the_numbers(
    make: Stores, lora: Folders
) -> None:
    """Regression: it waited for ever, since those never leave, and no new request was let in meanwhile."""
    handle = trained(build_pico("llama"), r=1, target_modules=["v_proj"])
    store = make(memory=2 * size_of(make(), lora(0)))
    store.add("given", handle.adapters["default"])
    for i in range(2):
        store.register(f"a{i}", lora(i))
    mix, alone = store.want((("a0", 0.5), ("a1", 0.5))), store.want((("a0", 1.0),))
    assert wait_for(store, mix) == "failed"
    assert mix.error is not None and "are held by adapters given from memory" in mix.error
    assert wait_for(store, alone) == "ready"
    assert wait_for(store, store.want((("given", 0.5), ("a0", 0.5)))) == "ready"
    store.remove("given")
    assert wait_for(store, store.want((("a0", 0.5), ("a1", 0.5)))) == "ready"


def test_a_folder_added_at_once_is_checked_and_a_broken_one_leaves_the_name_alone(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    digest = store.add("a", lora(0))
    assert store.want((("a", 1.0),)).state == "ready"
    broken = shutil.copytree(lora(1), tmp_path / "broken")
    truncate(broken)
    with pytest.raises(ValueError, match="not an intact safetensors file"):
        store.add("a", broken)
    lease = lease_of(store, "a")
    assert lease.parts[0].content.digest == digest
    store.release(lease)
    assert store.stats().num_loads == 0


def test_the_same_folder_added_again_after_a_change_is_new_content(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    first = store.add("a", folder)
    write_lora(build_pico("llama"), folder, seed=1)
    second = store.add("a", folder)
    assert first != second
    assert store.stats().num_contents == 1
    assert store.add("a", folder) == second
