"""`loramux eval`: scores of a base, with or without an adapter, or with many, on task files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import LoramuxError

CELL = ("adapter", "task", "metric", "value", "stderr", "rows", "difference", "difference_stderr")


def evaluate(
    base: Annotated[str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.jsonl ...", help="Task files; several may follow."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME ...", help="The same as --data demo:NAME/test.jsonl."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A saved adapter.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR ...", help="Several, scored in one load of the base."),
    ] = None,
    against_base: Annotated[
        bool,
        typer.Option("--against-base", help="With --adapters: the base too, and differences."),
    ] = False,
    cells: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="With --adapters: keep finished cells; skip those in it."
        ),
    ] = None,
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
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="With --adapters: the board as CSV."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Measure a model: choices are ranked by likelihood, other answers are generated.

    Example: loramux eval --base smollm2-135m --adapter runs/demo/adapter
    --data demo:snips/test.jsonl demo:clinc/test.jsonl --rows 100
    """
    files = [*(data or ()), *(f"demo:{name}/test.jsonl" for name in tasks or ())]
    if not files:
        raise LoramuxError("nothing to score on: give --data FILE.jsonl ... or --tasks NAME ...")
    common: dict[str, Any] = {
        "metrics": metric or None,
        "batch_size": batch_size,
        "threads": threads,
        "dtype": dtype,
        "task": task_name,
    }
    if adapters is None:
        _refuse_without_adapters(against_base, cells, csv_file)
        from loramux.eval.run import evaluate as run

        with only_json(json):
            result = run(base, adapter, files, rows, **common)
        emit(result, json, _show)
        return
    if adapter is not None:
        raise LoramuxError("--adapter and --adapters exclude each other; list all in --adapters")
    from loramux.eval.many import evaluate_many

    common |= {"against_base": against_base, "cells": cells}
    with only_json(json):
        result = evaluate_many(base, adapters, files, rows, **common)
    if csv_file is not None:
        _write_csv(csv_file, result["results"])
    emit(result, json, _show_board)


def _refuse_without_adapters(against_base: bool, cells: Path | None, csv_file: Path | None) -> None:
    given = {"--against-base": against_base, "--cells": cells, "--csv": csv_file}
    for name, value in given.items():
        if value:
            raise LoramuxError(
                f"{name} goes with --adapters DIR ...; give that, or leave {name} out"
            )


def _show(result: dict[str, Any]) -> None:
    keys = ["task", "metric", "value", "stderr", "rows"]
    rows = [[row[key] for key in keys] for row in result["results"]]
    table(f"{result['base']} + {result['adapter'] or 'no adapter'}", keys, rows)


def _show_board(result: dict[str, Any]) -> None:
    """A table per metric: adapters by tasks, each cell with its standard error and its difference to the base."""
    rows = result["results"]
    tasks = list(dict.fromkeys((row["task"], row["rows"]) for row in rows))
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells = {(r["adapter"], r["task"]): r for r in rows if r["metric"] == metric}
        shown = [task for task in tasks if any(key[1] == task[0] for key in cells)]
        lines = [
            [name, *(_cell(cells.get((name, task))) for task, _ in shown)]
            for name in dict.fromkeys(name for name, _ in cells)
        ]
        columns = ["adapter", *(f"{task} ({count} rows)" for task, count in shown)]
        table(f"{result['base']}: {metric}", columns, lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = _plus_minus(f"{row['value']:.3f}", row["stderr"])
    if row["difference"] is None:
        return text
    return f"{text}, {_plus_minus(format(row['difference'], '+.3f'), row['difference_stderr'])}"


def _plus_minus(value: str, error: float | None) -> str:
    return value if error is None else f"{value} ± {error:.3f}"


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CELL, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise LoramuxError(f"--csv {path}: cannot be written ({error.strerror})") from None
