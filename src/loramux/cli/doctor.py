"""`loramux doctor ADAPTER --base B`: the checks of an upload, on a folder or an archive, without uploading it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import LoramuxError

REFUSED = 2  # as for everything that is the user's to fix
SHOWN = 5


def doctor(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A saved adapter, or a zip or tar of one.")
    ],
    base: Annotated[str, typer.Option(help="Folder or name of the base it was trained on.")],
    max_rank: Annotated[int, typer.Option(min=1, help="The registry's limit.")] = 256,
    json: JsonOption = None,
) -> None:
    """Say whether a registry would take an adapter, and if not, why; exit code 2 if it would not.

    For a sound one: its digest, ranks, and how much it changes each linear relative to the base's weights. A linear far
    above the others is worth a look.

    Example: loramux doctor runs/sums --base smollm2-135m
    """
    with only_json(json):
        result = examine(adapter, base, max_rank)
    emit(result, json, _show)
    if not result["ok"]:
        raise typer.Exit(REFUSED)


def examine(adapter: Path, base: str, max_rank: int) -> dict[str, Any]:
    """The verdict as JSON: `ok`, and either what was found or `code` and `message`."""
    from loramux.fetch import resolve_base
    from loramux.registry.checks import (
        UploadError,
        UploadLimits,
        base_shape,
        check_upload,
        from_archive,
        from_folder,
    )

    folder = resolve_base(base)
    if not isinstance(folder, Path):
        raise LoramuxError(
            f"--base {base}: give the folder of the base, or a name that `loramux fetch` knows"
        )
    if not adapter.exists():
        raise LoramuxError(f"{adapter} does not exist; give an adapter's folder, or a zip or tar")
    shape = base_shape(folder)
    found: dict[str, Any] = {"adapter": str(adapter), "base": shape.name}
    source = from_folder(adapter) if adapter.is_dir() else from_archive(adapter)
    try:
        with check_upload(source, shape, UploadLimits(max_rank=max_rank)) as checked:
            return found | {
                "ok": True,
                "digest": checked.digest,
                "method": checked.method,
                "servability": checked.servability,
                "max_rank": checked.max_rank,
                "num_bytes": checked.num_bytes,
                "files": [file.path for file in checked.files],
                "experts": checked.experts,
                "norms": checked.norms,
                "notes": list(checked.notes),
            }
    except UploadError as error:
        return found | {"ok": False, "code": error.code, "message": str(error)}


def _show(result: dict[str, Any]) -> None:
    if not result["ok"]:
        print(f"refused ({result['code']}): {result['message']}")
        return
    print(
        f"sound: {result['method']}, {result['servability']}, rank up to {result['max_rank']}, {len(result['norms'])} "
        f"linears of {result['base']}, {result['num_bytes']:,} bytes\ndigest {result['digest']}"
    )
    for note in result["notes"]:
        print(f"note: {note}")
    largest = sorted(result["norms"].items(), key=lambda entry: -entry[1])[:SHOWN]
    table("Largest updates, relative to the weight", ["linear", "norm"], [list(e) for e in largest])
