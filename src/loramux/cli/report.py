"""`loramux report FOLDER`: one HTML file with pictures of what a run, an adapter, a merge or a comparison holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, a saved or merged adapter, or a comparison."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: run_report.html in the folder.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="Default: the base the folder names.")
    ] = None,
    sentence: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Draw the gates over this text, token by token."),
    ] = None,
    task_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the sentence, for routers that go by tasks."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.jsonl ...",
            help="Draw the routing of these tasks' questions; a folder ends the list.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Of each file.")] = 64,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    json: JsonOption = None,
) -> None:
    """Draw what a folder holds: losses, ranks, importance, experts, gates, merges, comparisons.

    The base is loaded only for --sentence and --data; everything else is read from the folder.

    Example: loramux report runs/mixlora --sentence "Play some jazz in the kitchen"
    """
    from loramux.report.build import make_report

    with only_json(json):
        result = make_report(
            folder, out, base=base, sentence=sentence, task=task_name, data=data or (), rows=rows
        )
    emit(result, json, _show)
    if open_it:
        import webbrowser

        webbrowser.open(Path(result["report"]).resolve().as_uri())


def _show(result: dict[str, Any]) -> None:
    print(result["report"])
    print(f"{result['kind']}: {', '.join(result['sections']) or 'nothing to draw'}")
    for part in result["missing"]:
        print(f"not in it: {part['what']} ({part['how']})")
