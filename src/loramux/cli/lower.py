"""`loramux lower ADAPTER --to peft --out DIR`: a plain adapter that does the same, or the reason why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json
from loramux.errors import LoramuxError


def lower(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the plain adapter.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="peft.")] = "peft",
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder, fetch name or hub id; mixtures need it."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt that routers decide on.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task, where a router looks up tasks.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="task or chat: put the prompt through that template.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the adapter that is in --out.")
    ] = False,
    check_base: Annotated[
        bool, typer.Option("--check-base/--no-check-base", help="Refuse another base than its own.")
    ] = True,
    json: JsonOption = None,
) -> None:
    """Write an adapter as one plain PEFT folder.

    A static adapter is exported bit for bit. A mixture that decides per request is materialised for one prompt or task:
    the chosen experts in one adapter, weights folded in. One that routes every token has no such form and is refused.

    Example: loramux lower runs/milora/adapter --base smollm2-135m --prompt "Play some jazz" --out plain
    """
    if template not in (None, "task", "chat"):
        raise LoramuxError(f"--template must be task or chat, got {template!r}")
    with only_json(json):
        from loramux.compose.lower import lower_adapter

        result = lower_adapter(
            adapter,
            out,
            to=to,
            base=base,
            prompt=prompt,
            template=template,
            task=task,
            force=force,
            check_base=check_base,
        )
    emit(result, json, _show)


def _show(result: dict[str, Any]) -> None:
    rank = result["rank"]
    print(
        f"{result['servability']}: {result['sites']} linears, rank {rank['min']} to {rank['max']}, written to "
        f"{result['out']}"
    )
