"""`loramux train RECIPE --out DIR`: what a recipe says, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import RecipeError

COLUMNS = ("name", "status", "steps", "train_loss", "val_loss", "seconds")


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for adapters, states and logs.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the recipe; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last state in the folder, if there is one.")
    ] = True,
    joint: Annotated[
        bool,
        typer.Option("--joint", help="Train the jobs together, in shared calls of the base."),
    ] = False,
    shard_base: Annotated[
        bool,
        typer.Option(
            "--shard-base",
            help="Under torchrun: every process holds a part of the base (FSDP2).",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it in full and stop.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train the adapters of a recipe.

    Safe to interrupt: the same command goes on where it stopped.

    Example: loramux train recipes/milora.yaml --set training.steps=20 --out runs/milora
    """
    from loramux.recipe import load_recipe

    checked = load_recipe(recipe, settings or ())
    if joint and checked.joint is None:
        checked = load_recipe(recipe, [*(settings or ()), "joint=true"])
    if dry_run:
        _show_resolved(checked, json)
        return
    if out is None:
        raise RecipeError("--out DIR is missing; name the folder that the run is written to")
    with only_json(json):
        from loramux.train.parallel import is_first_process
        from loramux.train.run import train_recipe

        result = train_recipe(checked, out, resume=resume, progress=True, shard_base=shard_base)
    if is_first_process():
        emit(result, json, _show)


def _show_resolved(recipe: Any, json: str | None) -> None:
    from loramux.recipe import dump_recipe

    jobs = recipe.jobs_resolved()
    emit(
        {"jobs": [job.model_dump(mode="json") for job in jobs]},
        json,
        lambda _: print("---\n".join(dump_recipe(job) for job in jobs), end=""),
    )


def _show(result: dict[str, Any]) -> None:
    jobs = result.get("jobs") or [result]
    table("Trained", COLUMNS, [[job.get(key) for key in COLUMNS] for job in jobs])
    for job in jobs:
        if job.get("reason"):
            print(f"{job['name']}: {job['status']}, {job['reason']}")
    for job in jobs:
        if job.get("adapter"):
            print(job["adapter"])
