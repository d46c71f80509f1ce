"""The threat model names tests that exist, and says so where there is none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "threat_model.md"
CITED = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")
ROW = re.compile(r"^\| (S\d+) \|.*\|$", re.MULTILINE)


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_threat_model_names_exists():
    missing, known = [], dict[str, set[str]]()
    for file, name in CITED.findall(PAGE.read_text(encoding="utf-8")):
        path = TESTS / file.removeprefix("tests/")
        if path.exists() and name and file not in known:
            known[file] = names_in(path)
        if not path.exists() or (name and name not in known[file]):
            missing.append(f"{file}::{name}")
    assert not missing


def test_every_row_names_a_test_or_says_that_there_is_none():
    rows = [match.group(0) for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    assert len(rows) > 30
    silent = [row for row in rows if not CITED.search(row) and "**no" not in row]
    assert not silent


def test_every_threat_of_the_list_has_a_row():
    text = PAGE.read_text(encoding="utf-8")
    assert {f"S{i}" for i in range(1, 25)} <= set(re.findall(r"\bS\d+\b", text))
