"""`loramux methods`: every command it prints runs, every file it names is there, and nothing is invented."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import loramux
import loramux.methods
from cli.test_compose_commands import base, logging_as_before, pair
from loramux.cli.main import main

ROOT = Path(__file__).parents[2]
__all__ = ["base", "logging_as_before", "pair"]


def listed() -> list[dict[str, Any]]:
    from loramux.cli.methods import methods

    found: list[dict[str, Any]] = []

    def keep(result: dict[str, Any], *_: Any) -> None:
        found.extend(result["methods"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loramux.cli.methods.emit", keep)
        methods(None)
    return found


def commands() -> list[Any]:
    return [
        pytest.param(method["recipe"], id=method["name"])
        for method in listed()
        if str(method["recipe"]).startswith("loramux ")
    ]


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_listed_runs_as_it_stands(
    command: str, pair: list[str], base: str, tmp_path: Path
) -> None:
    rows = [{"prompt": "a b c", "answer": "yes"}, {"prompt": "d e", "answer": "no"}]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"A": pair[0], "B": pair[1], "BASE": base, "FILE.jsonl": str(data)}
    names["DIR"] = str(tmp_path / "out")
    words = [names.get(word, word) for word in shlex.split(command)]
    # The adapters of the fixture differ in rank, which the sum of factors does not take.
    more = ["--set", "combine=delta", "budget=8"] if "lorahub" in words else []
    assert main([*words[1:], *more]) == 0
    assert (tmp_path / "out").is_dir()


def test_every_recipe_and_page_that_is_listed_is_a_file() -> None:
    for method in listed():
        assert (ROOT / method["page"]).is_file(), method["page"]
        if not method["recipe"].startswith("loramux "):
            assert (ROOT / method["recipe"]).is_file(), method["recipe"]


def test_no_recipe_and_no_page_are_made_up_for_methods_of_other_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Foreign(loramux.load_method("lora")):  # type: ignore[misc]
        name = "foreign"

    monkeypatch.setattr(EntryPoint, "load", lambda _: Foreign)
    point = EntryPoint("foreign", "elsewhere:METHOD", "loramux.methods")
    monkeypatch.setattr(loramux.methods, "_entry_points", lambda: {"foreign": point})
    assert main(["methods", "--json", "-"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)["methods"]}
    assert found["foreign"]["recipe"] is None and found["foreign"]["page"] is None
    assert found["lora"]["recipe"] == "recipes/lora.yaml"
    assert main(["methods"]) == 0
