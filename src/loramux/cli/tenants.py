"""`loramux tenants`: many tenants' adapters, made on the spot, answered in one batch."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table

DIGITS = 8  # of a digest


def tenants(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where adapters and report go.")] = Path(
        "runs/tenants"
    ),
    base: Annotated[
        str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")
    ] = "smollm2-135m",
    json: JsonOption = None,
) -> None:
    """Make 32 adapters (five trained, the rest derived) and answer 32 tenants in one batch over one base.

    Safe to interrupt: adapters that are made are kept.

    Example: loramux tenants --out runs/tenants
    """
    from loramux.demo.tenants import main

    with only_json(json):
        result = main(out=out, base=base)
    emit(result, json, show)


def show(result: dict[str, Any]) -> None:
    rows = [
        [
            row["tenant"],
            row["adapter"],
            row["error"] or row["text"],
            "yes" if row["is_right"] else f"no: {row['answer']}",
            row["digest"][:DIGITS],
            row["first_token_ms"]["cold"],
            row["first_token_ms"]["warm"],
        ]
        for row in result["tenants"]
    ]
    columns = ["tenant", "adapter", "answer", "right", "digest", "first, cold", "warm"]
    table(f"{len(rows)} tenants, one batch (time to the first token in ms)", columns, rows)
    right, speed = result["num_right"], result["speed"]
    counted = ", ".join(f"{n['right']} of {n['of']} {kind}" for kind, n in right.items())
    print(f"right: {counted}")
    batch, alone = (median(speed[f"{way}_tokens_per_second"]) for way in ("batch", "alone"))
    print(
        f"{batch:.1f} tokens/s in one batch, {alone:.1f} one tenant after the other: "
        f"{speed['times_faster']} times as fast"
    )
    print(f"{speed['num_same']} of {len(rows)} answers are the same alone, token by token")
    print(
        f"{result['training_seconds']:.0f} s of training, {result['other_seconds']:.0f} s for the rest "
        f"(threads: {result['threads']})"
    )
