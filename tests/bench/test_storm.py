"""The storm: no foreign token in a sound engine, and a report of each way in which an engine can be unsound."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loramux.bench import churn as churn_module
from loramux.bench import storm as storm_module
from loramux.bench.churn import churn
from loramux.bench.judge import Outcome
from loramux.bench.storm import Plan, Storm, main
from loramux.engine import engine as engine_module
from loramux.engine.keys import PrefixKey
from loramux.engine.names import Entry
from loramux.engine.program import Program
from loramux.engine.slots import SlotTier
from loramux.engine.store import Lease
from loramux.ops.slots import SlotTable

STEPS = 150
SMALL = Plan(steps=STEPS, adapters=24, slots=5, checked=0.1)


def storm(root: Path, plan: Plan = SMALL) -> Outcome:
    return Storm(plan, root).run()


def test_sixty_four_adapters_in_eight_slots_never_say_a_foreign_token(tmp_path: Path):
    outcome = storm(tmp_path, Plan(steps=400, checked=0.1))
    assert outcome.problems == []
    counts = outcome.counts
    assert counts["steps"] >= 400 and counts["tokens"] > 2000
    for claim in (
        "swaps, other folder",
        "swaps, folder overwritten",
        "swaps, from memory",
        "removals",
        "finished, abort",
        "preemptions",
        "cached tokens",
        "slot evictions",
        "memory evictions",
        "answers with log-probabilities checked",
    ):
        assert counts[claim] > 0, f"{claim}: it never came to that"
    assert counts["loads failed"] == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_other_storms_pass_too(seed: int, tmp_path: Path):
    assert storm(tmp_path, Plan(steps=STEPS, seed=seed, adapters=16, slots=4)).problems == []


# --- What a storm would notice -----------------------------------------------------------------------


def test_a_prefix_shared_between_contents_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def key(*, salt: str, base: str, parts: Any) -> PrefixKey:
        return PrefixKey(salt=salt, base=base, parts=())

    monkeypatch.setattr(engine_module, "PrefixKey", key)
    # The last layer says the token, and what it reads is the same for all: only log-probabilities tell.
    outcome = storm(tmp_path, Plan(steps=STEPS, adapters=24, slots=5, checked=1.0))
    assert any("log-probability" in problem for problem in outcome.problems)


def test_slots_that_keep_the_rows_of_the_content_before_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put, seen = SlotTable.put, []

    def lazy(self: SlotTable, slots: Any, packed: Any) -> None:
        seen.append(slots)
        if len(seen) % 7 or len(seen) < 10:
            put(self, slots, packed)

    monkeypatch.setattr(SlotTable, "put", lazy)
    monkeypatch.setattr(SlotTable, "clear", lambda self, slots: None)
    assert any("foreign tokens" in problem for problem in storm(tmp_path).problems)


def test_pairs_that_name_a_neighbours_slot_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index = Program._index

    def shifted(self: Program) -> Any:
        token, slot = index(self)
        return token, slot.roll(1) if len(slot) > 8 else slot

    monkeypatch.setattr(Program, "_index", shifted)
    assert any("foreign tokens" in problem for problem in storm(tmp_path).problems)


def test_a_folder_that_changed_and_is_not_read_again_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Entry, "look", lambda self: None)

    # Whether an overwritten folder is still in memory when it is asked for again depends on the loader's thread.
    def problems() -> Iterator[str]:
        for seed in range(8):
            plan = Plan(steps=STEPS, adapters=8, slots=5, swap=0.6, seed=seed)
            yield from storm(tmp_path / str(seed), plan).problems

    assert any("was answered by version" in problem for problem in problems())


def test_a_digest_that_does_not_follow_the_rows_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def answered(self: Lease) -> Any:
        return tuple((part.name, "0" * 64, part.weight) for part in self.parts)

    monkeypatch.setattr(Lease, "answered", property(answered))
    assert any("was answered by" in problem for problem in storm(tmp_path).problems)


def test_a_pin_that_is_not_given_back_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    release, calls = SlotTier.release, []

    def forgetful(self: SlotTier, digest: str) -> None:
        calls.append(digest)
        if len(calls) != 20:
            release(self, digest)

    monkeypatch.setattr(SlotTier, "release", forgetful)
    with pytest.raises(AssertionError):
        storm(tmp_path)


# --- Loading and unloading ---------------------------------------------------------------------------


def test_some_hundred_loads_and_unloads_leave_memory_flat(tmp_path: Path):
    found = churn(300, tmp_path)
    assert found.problems == []
    assert found.left == (0, 0, 0, 0)


def test_contents_that_stay_behind_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[mmap.mmap] = []  # pages of their own: the heap may hold room that earlier tests left
    remove = engine_module.Engine.remove_adapter

    def leaky(self: Any, name: str) -> None:
        kept.append(mmap.mmap(-1, 1_000_000))
        kept[-1].write(b"1" * 1_000_000)
        remove(self, name)

    monkeypatch.setattr(engine_module.Engine, "remove_adapter", leaky)
    (problem,) = churn(100, tmp_path).problems
    assert "100 loads and unloads left" in problem


# --- The command -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Few(Plan):
    """What the command would do with fewer adapters: here it is about what it says."""

    adapters: int = 12


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storm_module, "Plan", Few)


@pytest.mark.usefixtures("few")
def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "storm.json"
    code = main(["--steps", "30", "--cycles", "20", "--quiet", "--json", str(file)])
    found = json.loads(file.read_text())
    assert code == 0
    assert found["storm"]["counts"]["steps"] >= 30
    assert found["loads"]["cycles"] == 20
    assert capsys.readouterr().out.endswith("all held\n")


@pytest.mark.usefixtures("few")
def test_the_command_fails_if_a_claim_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(churn_module, "MOST_MB", -1e9)
    assert main(["--steps", "5", "--cycles", "10", "--quiet"]) == 1
    assert "PROBLEM: 10 loads and unloads left" in capsys.readouterr().out


def test_the_command_refuses_a_storm_without_steps(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err
