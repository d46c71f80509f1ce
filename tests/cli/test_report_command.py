"""`loramux report` hands over what it was told and says where the page is and what is not in it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.cli.main import main

RESULT = {
    "report": "run/run_report.html",
    "kind": "run",
    "bytes": 5,
    "sections": ["Training"],
    "missing": [{"what": "Scores", "how": "measure them"}],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def make_report(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made.append((args, kwargs))
        return RESULT

    monkeypatch.setitem(
        sys.modules, "loramux.report.build", SimpleNamespace(make_report=make_report)
    )
    return made


def test_the_folder_the_sentence_and_the_files_are_handed_over(calls: list[Any]) -> None:
    args = ["report", "run", "--base", "b", "--sentence", "hi there", "--task-name", "ask"]
    assert main([*args, "--out", "x.html", "--data", "a.jsonl", "b.jsonl", "--rows", "9"]) == 0
    (((folder, out), options),) = calls
    assert (folder, out) == (Path("run"), Path("x.html"))
    assert options == {
        "base": "b",
        "sentence": "hi there",
        "task": "ask",
        "data": ["a.jsonl", "b.jsonl"],
        "rows": 9,
    }


def test_the_page_comes_first_and_what_is_missing_last(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run/run_report.html"
    assert lines[-1] == "not in it: Scores (measure them)"
    assert main(["report", "run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


def test_open_shows_the_file_in_a_browser(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert main(["report", "run", "--open"]) == 0
    assert shown == [Path("run/run_report.html").resolve().as_uri()]


def test_a_wrong_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} holds none of run.json")
    assert len(error.splitlines()) == 1
