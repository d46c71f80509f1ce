"""`loramux methods`: what can be trained here, and how trained adapters can be merged."""

from __future__ import annotations

from typing import Any

from loramux.cli.output import JsonOption, emit, only_json, table

KEYS = ("name", "paper", "granularity", "routing_unit", "servability")
MERGE_KEYS = ("name", "paper", "rank", "servability")


def methods(json: JsonOption = None) -> None:
    """List the methods: paper, granularity, routing unit and how each can be served; then the ways to merge adapters.

    Example: loramux methods --json -
    """
    with only_json(json):
        from loramux.compose.mergers import list_mergers
        from loramux.methods import list_methods

        result = {"methods": list_methods(), "merging": list_mergers()}
    emit(result, json, _show)


def _show(result: dict[str, Any]) -> None:
    rows = [[method[key] for key in KEYS] for method in result["methods"]]
    table("Methods", [key.replace("_", " ") for key in KEYS], rows)
    merging = [[merger[key] for key in MERGE_KEYS] for merger in result["merging"]]
    table("Merging (loramux compose)", MERGE_KEYS, merging)
