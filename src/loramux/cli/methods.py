"""`loramux methods`: what can be trained here."""

from __future__ import annotations

from typing import Any

from loramux.cli.output import JsonOption, emit, only_json, table

KEYS = ("name", "paper", "granularity", "routing_unit", "servability")


def methods(json: JsonOption = None) -> None:
    """List the methods: paper, granularity, routing unit and how each can be served.

    Example: loramux methods --json -
    """
    with only_json(json):
        from loramux.methods import list_methods

        found = list_methods()
    emit({"methods": found}, json, _show)


def _show(result: dict[str, Any]) -> None:
    rows = [[method[key] for key in KEYS] for method in result["methods"]]
    table("Methods", [key.replace("_", " ") for key in KEYS], rows)
