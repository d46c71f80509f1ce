"""`loramux config schema`: what a recipe may say, for editors."""

from __future__ import annotations

from typing import Annotated

import typer

from loramux.cli.output import STDOUT, emit

app = typer.Typer(no_args_is_help=True, help="About recipes.")


@app.callback()
def about() -> None:
    """About recipes: their schema.

    Example: loramux config schema --json recipe.schema.json
    """


@app.command("schema")
def schema(
    json: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Where to write it.")
    ] = STDOUT,
) -> None:
    """Print the JSON Schema of a recipe.

    Example: loramux config schema --json recipe.schema.json
    """
    from loramux.recipe import recipe_schema

    emit(recipe_schema(), json, lambda _: None)
