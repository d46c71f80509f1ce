"""The reference pages are what the code says: they are made again and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux.cli.main import app
from loramux.cli.reference import cli_reference, http_reference, openapi_schema

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_page_on_the_command_line_is_that_of_the_code():
    assert (REFERENCE / "cli.md").read_text(encoding="utf-8") == cli_reference(), (
        "docs/reference/cli.md is out of date; run: make reference"
    )


def test_the_page_on_the_http_interface_is_that_of_the_code():
    pytest.importorskip("fastapi")
    assert (REFERENCE / "http.md").read_text(encoding="utf-8") == http_reference(
        openapi_schema()
    ), "docs/reference/http.md is out of date; run: make reference"


def test_every_verb_has_a_section():
    page = cli_reference()
    for command in app.registered_commands:
        assert f"## loramux {command.name}\n" in page


def test_an_example_of_two_lines_is_one_piece_of_code():
    page = cli_reference()
    assert "    loramux eval --base smollm2-135m" in page
    assert "\n--data demo:" not in page
