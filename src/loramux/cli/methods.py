"""`loramux methods`: what can be trained, routed and merged here."""

from __future__ import annotations

from typing import Any

from loramux.cli.output import JsonOption, emit, only_json, table

KEYS = ("name", "paper", "granularity", "routing_unit", "servability", "recipe", "page")
# Merging methods share a page, but for the one that is a paper of this field's own.
OWN_PAGE = ("loralego",)


def methods(json: JsonOption = None) -> None:
    """List the methods: paper, granularity, routing unit, how each can be served, its recipe or command, its page.

    Example: loramux methods --json -
    """
    with only_json(json):
        from loramux.compose.mergers import list_mergers
        from loramux.methods import list_methods

        found = [_trained(method) for method in list_methods()]
        found += [_merged(merger) for merger in list_mergers()]
    emit({"methods": found}, json, _show)


def _trained(method: dict[str, str]) -> dict[str, str | None]:
    from loramux.compose.routed import UNTRAINED
    from loramux.methods import own_names

    name = method["name"]
    if name not in own_names():  # of another package, whose files are not known here
        return {**method, "recipe": None, "page": None}
    recipe = _command(name, "--base BASE") if name in UNTRAINED else f"recipes/{name}.yaml"
    return {**method, "recipe": recipe, "page": f"docs/methods/{name}.md"}


def _merged(merger: dict[str, Any]) -> dict[str, str | None]:
    name = merger["name"]
    return {
        "name": name,
        "title": merger["title"],
        "paper": merger["paper"],
        "granularity": "adapters merged",
        "routing_unit": "none",
        "servability": merger["servability"],
        "recipe": _command(
            name, *(["--base BASE --data FILE.jsonl"] if merger["searches"] else [])
        ),
        "page": f"docs/methods/{name}.md" if name in OWN_PAGE else "docs/compose.md",
    }


def _command(name: str, *needed: str) -> str:
    return " ".join([f"loramux compose {name} A B", *needed, "--out DIR"])


def _show(result: dict[str, Any]) -> None:
    rows = [[method[key] for key in KEYS] for method in result["methods"]]
    table("Methods", [key.replace("_", " ") for key in KEYS], rows)
