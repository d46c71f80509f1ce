"""The comparison of a crowd with requests alone, on a base small enough for a test; real ones take minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramux.bench import alike as module
from loramux.bench.alike import compare, main
from loramux.bench.markers import build_base
from loramux.bench.progress import silent
from loramux.engine.program import Program


def test_a_small_base_answers_alike_alone_and_in_a_crowd(tmp_path: Path):
    # Who is admitted when depends on when its adapter was read, so a crowd may find room for all.
    preemptions = 0
    for seed in range(6):
        found = compare(build_base(32), tmp_path / str(seed), 40, seed, silent)
        assert found.problems == []
        assert found.worst.keys() == {"base", "plain", "milora", "mixlora", "gated", "mix"}
        preemptions += found.preemptions
        if preemptions:
            return
    raise AssertionError("no crowd had a sequence preempted")


def test_weights_that_move_to_a_neighbour_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = Program._weights

    def shifted(self: Program):
        found = weights(self)
        return found.roll(1, dims=1) if self.num_pairs > 3 else found

    monkeypatch.setattr(Program, "_weights", shifted)
    assert compare(build_base(32), tmp_path, 16, 0, silent).problems


def test_the_command_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    build_base(32).save_pretrained(tmp_path / "base")
    file = tmp_path / "alike.json"
    arguments = [str(tmp_path / "base"), "--requests", "4", "--quiet", "--json", str(file)]
    assert main(arguments) == 0
    assert json.loads(file.read_text())["requests"] == 4
    assert capsys.readouterr().out.endswith("all alike\n")
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    assert main(arguments) == 1
    assert "PROBLEM:" in capsys.readouterr().out
