"""States are whole or passed over, the last two are kept, and another recipe's are refused by name."""

import json
import logging
from pathlib import Path

import pytest
import torch

from loramux.train.checkpoint import CheckpointError, CheckpointStore, differences, refuse_other


def save(store: CheckpointStore, number: int) -> None:
    store.save(number, {"round": number}, {"0.adapter": {"w": torch.full((3,), float(number))}})


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest() is None
    for number in (5, 10, 15):
        save(store, number)
    assert store.numbers() == [10, 15]
    saved = store.newest()
    assert saved is not None
    assert saved.meta["round"] == 15
    assert saved.tensors["0.adapter"]["w"].tolist() == [15.0] * 3


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest"])
def test_a_damaged_state_falls_back_to_the_one_before_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    save(store, 10)
    victim = tmp_path / "00000010" / "0.adapter.safetensors"
    data = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(data[:-4])
    elif damage == "changed":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        victim.unlink()
    else:
        (tmp_path / "00000010" / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        saved = store.newest()
    assert saved is not None
    assert saved.number == 5
    assert "00000010" in caplog.text
    # The run comes past the damaged one again and replaces it.
    save(store, 10)
    again = store.newest()
    assert again is not None
    assert again.number == 10


def test_states_from_before_a_fallback_do_not_push_out_good_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    save(store, 10)
    save(store, 7)
    assert store.numbers() == [5, 7]


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"version": 99}, {})
    with pytest.raises(CheckpointError, match="another version"):
        store.newest()


def test_nothing_in_a_state_is_pickled(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    names = sorted(p.name for p in (tmp_path / "00000001").iterdir())
    assert names == ["0.adapter.safetensors", "manifest.json", "run.json"]
    json.loads((tmp_path / "00000001" / "run.json").read_text())


def test_differences_are_named_by_their_path() -> None:
    saved = {"jobs": {"a": {"training": {"steps": 80, "lr": 1.0}, "seed": 0}}}
    now = {"jobs": {"a": {"training": {"steps": 40, "lr": 1.0}, "seed": 0, "new": [1]}}}
    assert differences(saved, now) == [
        "jobs.a.training.steps: 80 there, 40 here",
        "jobs.a.new: null there, [1] here",
    ]
    refuse_other(saved, saved, Path("run"))
    with pytest.raises(CheckpointError, match=r"training\.steps: 80 there.*choose another folder"):
        refuse_other(saved, now, Path("run"))
