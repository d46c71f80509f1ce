"""`loramux demo`: the main job from end to end, on real data and a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where report and adapter go.")] = Path(
        "runs/demo"
    ),
    base: Annotated[
        str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")
    ] = "smollm2-135m",
) -> None:
    """Train one mixture over several tasks, measure it before and after, show its routing.

    Safe to interrupt: the same command goes on where it stopped.

    Example: loramux demo --out runs/demo
    """
    from loramux.demo.run import main

    main(out=out, base=base)
