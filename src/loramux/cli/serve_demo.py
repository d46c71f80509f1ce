"""`loramux serve-demo`: the server with real adapters and the official client, every answer checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table


def serve_demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where registry, configuration and report go.")
    ] = Path("runs/serve"),
    base: Annotated[
        str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")
    ] = "smollm2-135m",
    adapters: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where `loramux tenants` keeps its adapters; made if missing."
        ),
    ] = Path("runs/tenants"),
    json: JsonOption = None,
) -> None:
    """Serve trained adapters to two tenants with keys, ask with the `openai` client, check every answer.

    One adapter, a mix, a MiLoRA, `auto`, uploads good and bad, foreign names, receipts and a replay. Exit code 1 names
    the steps that were wrong. Safe to interrupt: what is trained is kept.

    Example: loramux serve-demo --out runs/serve
    """
    from loramux.demo.serve import main

    with only_json(json):
        result = main(out=out, base=base, adapters=adapters)
    emit(result, json, show)
    if result["failed"]:
        typer.echo(f"error: these steps were wrong: {', '.join(result['failed'])}", err=True)
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    rows = [
        [step["name"], "yes" if step["is_right"] else "NO", step["answered"], step["seconds"]]
        for step in result["steps"]
    ]
    table("The server, step by step", ["step", "right", "answered", "s"], rows)
    seconds = result["seconds"]
    print(
        f"{len(rows) - len(result['failed'])} of {len(rows)} steps right; {seconds['adapters']:.0f} s for adapters, "
        f"{seconds['start']:.0f} s to start, {seconds['steps']:.0f} s for the steps"
    )
