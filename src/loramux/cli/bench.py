"""`loramux bench`: speed against the references, with an interval and a control."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table


class What(StrEnum):
    """What can be timed."""

    decode = "decode"
    train = "train"


KEYS = ("what", "variant", "reference", "batch", "adapters", "ratio", "low", "high", "target")


def bench(
    what: Annotated[What, typer.Argument(help="Which speed.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds on a small model: does it run?")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Time variants against references; ratios are medians of paired rounds.

    Example: loramux bench decode --quick --json bench.json
    """
    with only_json(json):
        from loramux.bench.run import bench as run

        result = run(what.value, quick)
    emit(result, json, _show)


def _show(result: dict[str, Any]) -> None:
    table(
        "time(variant) / time(reference)", KEYS, [[r.get(k) for k in KEYS] for r in result["rows"]]
    )
