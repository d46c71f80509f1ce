"""`loramux bench` passes on what it was told, and shows every row and every absent peer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.bench.run import PARTS
from loramux.cli.bench import Part, What
from loramux.cli.main import main

ROW = {
    "what": "decode", "variant": "engine", "reference": "bare", "batch": 8, "adapters": 8,
    "ratio": 0.65, "low": 0.6, "high": 0.7, "target": 0.75, "verdict": "met", "ms": 41.5,
}  # fmt: skip
LOAD = ROW | {"what": "load", "target": None, "target_ms": 40.0, "ms": 22.125}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def bench(*args: Any, **options: Any) -> dict[str, Any]:
        seen.append((args, options))
        return {"rows": [ROW, LOAD], "absent": {"llama-cpp-python": "llama_cpp is not installed"}}

    monkeypatch.setitem(sys.modules, "loramux.bench.run", SimpleNamespace(bench=bench))
    return seen


@pytest.mark.parametrize("what", ["decode", "prefill", "mixed", "load", "residency", "serve"])
def test_everything_the_engine_promises_can_be_asked_for(what: str, calls: list[Any]) -> None:
    assert main(["bench", what, "--quick", "--part", "engine"]) == 0
    assert calls == [((what, True), {"base": None, "part": "engine", "rounds": None})]


def test_the_names_are_those_of_the_library() -> None:
    # `schedule` simulates; it has no parts.
    assert [what.value for what in What if what is not What.schedule] == list(PARTS)
    assert {part.value for part in Part} == {name for parts in PARTS.values() for name in parts}


def test_rows_show_their_milliseconds_and_targets(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode"]) == 0
    shown = capsys.readouterr().out
    for text in ("0.650", "0.600 - 0.700", "0.750", "41.5", "40 ms", "22.125"):
        assert text in shown
    assert "not measured: llama-cpp-python: llama_cpp is not installed" in shown


def test_a_picture_is_written_beside_the_json(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Path] = []
    plot = SimpleNamespace(save_chart=lambda _result, path: drawn.append(path))
    monkeypatch.setitem(sys.modules, "loramux.bench.plot", plot)
    assert main(["bench", "mixed", "--json", str(tmp_path / "mixed.json")]) == 0
    assert drawn == [tmp_path / "mixed.png"]
    assert (tmp_path / "mixed.json").exists()


def test_what_there_is_no_measurement_of_is_refused(calls: list[Any]) -> None:
    assert main(["bench", "speed"]) == 2
    assert main(["bench", "decode", "--part", "half"]) == 2
    assert calls == []
