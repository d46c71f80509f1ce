"""`loramux bench`: speed against the references, with an interval and a control."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import STDOUT, JsonOption, emit, only_json, table


class What(StrEnum):
    """What can be timed."""

    decode = "decode"
    train = "train"


COLUMNS = ("what", "batch", "variant", "reference", "ratio", "95 %", "target", "verdict")


def bench(
    what: Annotated[What, typer.Argument(help="Which speed.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds on a small model: does it run?")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkpoint instead of random weights.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Time variants against references; ratios are medians of paired rounds.

    With --json FILE a picture, FILE with the ending .png, is written beside it.

    Example: loramux bench decode --quick --json bench.json
    """
    with only_json(json):
        from loramux.bench.run import bench as run

        result = run(what.value, quick, base=base)
    emit(result, json, _show)
    if json is not None and json != STDOUT:
        from loramux.bench.plot import save_chart

        save_chart(result, Path(json).with_suffix(".png"))


def _show(result: dict[str, Any]) -> None:
    rows = [
        [
            *(row.get(key) for key in ("what", "batch", "variant", "reference", "ratio")),
            f"{row['low']:.3f} - {row['high']:.3f}",
            *(row.get(key) for key in ("target", "verdict")),
        ]
        for row in result["rows"]
    ]
    table("time(variant) / time(reference)", COLUMNS, rows)
