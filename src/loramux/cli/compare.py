"""`loramux compare SUITE --out DIR`: methods x tasks x seeds, restartable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import STDOUT, JsonOption, emit, only_json, table

LINES = ("method", "mean", "spread", "row_error", "seeds", "difference", "low", "high")


def compare(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="The suite.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for rows, adapters and results.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="A part, method, task or seed=N; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Rows under way at a time.")] = 1,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed rows again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, ranks and estimated time; run nothing.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of the rows so far; run nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Compare methods at equal trainable parameters and equal tokens.

    Safe to interrupt: the same command does what is missing. Each row is written as soon as it exists.

    Example: loramux compare suites/quick.yaml --out runs/quick
    """
    from loramux.compare import SuiteError, load_suite

    checked = load_suite(suite)
    if out is None and not dry_run:
        raise SuiteError("--out DIR is missing; name the folder that rows are written to")
    if dry_run:
        from loramux.compare.dry import dry_run as plan

        with only_json(json):
            planned = plan(checked, out, only or (), workers)
        emit(planned, json, _show_plan)
        return
    assert out is not None
    if markdown:
        _print_tables(checked, out)
        return
    with only_json(json):
        from loramux.compare.run import run_suite

        result = run_suite(
            checked, out, only=only or (), retry_failed=retry_failed, workers=workers
        )
    emit(result, json, _show)
    if json != STDOUT:
        print(f"{out / 'results.md'}  {out / 'results.png'}  {out / 'results.json'}")


def _print_tables(suite: Any, out: Path) -> None:
    from loramux.compare.run import results
    from loramux.compare.tables import markdown

    print(markdown(results(suite, out)), end="")


def _show(result: dict[str, Any]) -> None:
    from loramux.compare.tables import TITLES

    for name, part in result["parts"].items():
        lines = [_line(entry) for entry in part["methods"]]
        if not lines:
            continue
        table(f"{TITLES[name]}; differences are to {part['reference']}", LINES, lines)
    _show_gaps(result)


def _line(entry: dict[str, Any]) -> list[Any]:
    found = entry["difference"] or {}
    own = [entry[key] for key in ("method", "mean", "spread", "row_error")]
    return [*own, len(entry["seeds"]), *(found.get(key) for key in ("value", "low", "high"))]


def _show_gaps(result: dict[str, Any]) -> None:
    for failed in result.get("failed", ()):
        print(f"failed: {failed['row']}: {failed['reason']}")


def _show_plan(plan: dict[str, Any]) -> None:
    from loramux.compare.progress import duration

    columns = ["part", "method", "task", "seed", "tokens", "test_tokens", "done"]
    table("Rows", columns, [[row[key] for key in columns] for row in plan["rows"]])
    lines = [
        [label, one["parameters"], f"{one['deviation']:+.2%}", one["how"]]
        for label, one in plan["matched"].items()
    ]
    table(
        f"Budget of {plan['budget']:,} trainable parameters",
        ["method", "parameters", "off", "how"],
        lines,
    )
    _show_gaps(plan)
    print(f"{plan['left']} rows to do, about {duration(plan['seconds'])}")
