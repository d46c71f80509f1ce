"""`loramux eval`: scores of a base, with or without an adapter, on task files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table


def evaluate(
    base: Annotated[str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")],
    data: Annotated[
        list[str], typer.Option(metavar="FILE.jsonl ...", help="Task files; several may follow.")
    ],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A saved adapter.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N rows of each file.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="token, raw, byte, exact_match or bleu; repeatable. Default: what fits."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    task_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Tell adapters that go by tasks this one, not the rows' own."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: that of the base.")] = None,
    json: JsonOption = None,
) -> None:
    """Measure a model: choices are ranked by likelihood, other answers are generated.

    Example: loramux eval --base smollm2-135m --adapter runs/demo/adapter
    --data demo:snips/test.jsonl demo:clinc/test.jsonl --rows 100
    """
    from loramux.eval.run import evaluate as run

    with only_json(json):
        result = run(
            base,
            adapter,
            data,
            rows,
            metrics=metric or None,
            batch_size=batch_size,
            threads=threads,
            dtype=dtype,
            task=task_name,
        )
    emit(result, json, _show)


def _show(result: dict[str, Any]) -> None:
    keys = ["task", "metric", "value", "stderr", "rows"]
    rows = [[row[key] for key in keys] for row in result["results"]]
    table(f"{result['base']} + {result['adapter'] or 'no adapter'}", keys, rows)
