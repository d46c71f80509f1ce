"""`loramux compose METHOD A B ... --out DIR`: several adapters become one, or one router over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import LoramuxError

SHOWN = 12  # linears in the table; the file has all
NOTHING = 1e-6  # what is lost by rounding alone is not listed


def compose(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD", help="As `loramux methods` lists under merging, or arrow."
        ),
    ],
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of saved LoRAs of one base.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the merged adapter.")],
    weights: Annotated[
        list[float] | None,
        typer.Option(metavar="W ...", help="One per adapter, in their order; negative subtracts."),
    ] = None,
    lam: Annotated[
        float, typer.Option("--lambda", metavar="X", help="Multiplies the merged change.")
    ] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Of the result, for methods that choose one."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="P", help="Share of entries kept: ties, dare_*.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other option of the method."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Check the adapters against this base; lorahub needs it."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.jsonl ...", help="Examples for lorahub's search; folders end the list."
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="lorahub: the first N rows of each file, else 5."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything random in a merge.", show_default="0")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the adapter that is in --out.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Merge trained LoRAs into one plain adapter, without training.

    The result loads in PEFT and everywhere else; compose.json beside it holds ranks, errors and the similarity of the
    inputs. With one adapter, loralego and svd compress it. arrow gives a mixture instead (and needs --base); routers
    that are trained (mole, loraflow, xlora, ramole) are made by `loramux train`.

    Example: loramux compose ties runs/snips/adapter runs/clinc/adapter --weights 0.7 0.3 --rank 16 --out merged
    """
    options = {**_options(settings or ()), **_given(rank=rank, density=density)}
    with only_json(json):
        from loramux.compose.mergers import merger_names

        if method not in merger_names():
            from loramux.compose.routed import compose_router

            lam_given = None if lam == 1 else lam
            unused = _given(
                weights=weights, data=data, rows=rows, seed=seed, **{"lambda": lam_given}
            )
            result = compose_router(
                method, adapters, out, base=base, force=force, unused=list(unused), options=options
            )
        else:
            from loramux.compose.run import compose_adapters

            with _bar(adapters) as advance:
                result = compose_adapters(
                    method,
                    adapters,
                    out,
                    weights=weights,
                    lam=lam,
                    seed=seed or 0,
                    base=base,
                    data=data or (),
                    rows=rows,
                    force=force,
                    advance=advance,
                    options=options,
                )
    emit(result, json, _show)


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _options(settings: Sequence[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found or not key.isidentifier():
            raise LoramuxError(f"--set takes KEY=VALUE, got {setting!r}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            raise LoramuxError(
                f"--set {setting}: the value is not readable as YAML ({why})"
            ) from None
    return options


@contextmanager
def _bar(adapters: Sequence[Path]) -> Iterator[Any]:
    """A bar on standard error that shows the linear (or the search) at work."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]Merging"),
        BarColumn(),
        TextColumn("{task.completed} {task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("", total=None)
        yield lambda what: bar.update(line, advance=1, description=what)


def _show(result: dict[str, Any]) -> None:
    if "sites" in result:
        _show_merge(result)
    print(result["out"])


def _show_merge(result: dict[str, Any]) -> None:
    inputs = zip(result["inputs"], result["weights"], strict=True)
    rows = [[i["name"], w, _range(i["rank"]), i["sites"], i["digest"][:12]] for i, w in inputs]
    table(f"Merged by {result['title']}", ("adapter", "weight", "rank", "linears", "digest"), rows)
    if len(rows) > 1:
        alike = result["similarity"]
        cosines = [
            [name, *line] for name, line in zip(alike["names"], alike["overall"], strict=True)
        ]
        table("Cosine of the products", ("adapter", *alike["names"]), cosines)
    costs = sorted(result["sites"], key=_cost, reverse=True)
    worst = [row for row in costs[:SHOWN] if _cost(row) > NOTHING]
    shown = [[row["site"], row["rank"], row["error"], row["distance"]] for row in worst]
    means = [(result[key] or {}).get("mean") for key in ("error", "distance")]
    shown.append([f"all {len(costs)}: range, mean, mean", _range(result["rank"]), *means])
    columns = ("linear", "rank", "error", "distance to the sum")
    table("Rank kept and what it costs (worst first)", columns, shown)


def _cost(row: dict[str, Any]) -> float:
    return float(row["error"] or row["distance"] or 0)


def _range(rank: dict[str, Any]) -> str:
    low, high = rank["min"], rank["max"]
    return str(low) if low == high else f"{low}-{high}"
