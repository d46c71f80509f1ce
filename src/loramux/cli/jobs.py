"""`loramux jobs RUN`: how the jobs of a joint run stand, and what is asked of them while it goes on."""

from __future__ import annotations

import json as json_
import os
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, table
from loramux.errors import LoramuxError

COLUMNS = (
    "job",
    "status",
    "step",
    "steps",
    "loss",
    "tokens_per_second",
    "share",
    "left_s",
    "reason",
)
TIMEOUT_SECONDS = 40.0


class Action(StrEnum):
    list = "list"
    add = "add"
    pause = "pause"
    resume = "resume"
    cancel = "cancel"
    priority = "priority"


def jobs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.list,
    what: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job; for add, the file of a new one.")
    ] = None,
    value: Annotated[int | None, typer.Argument(metavar="N", help="The new priority.")] = None,
    json: JsonOption = None,
) -> None:
    """See and steer the jobs that `loramux train` trains together.

    Example: loramux jobs runs/many pause boolq
    """
    if action is Action.list:
        emit({"jobs": _listed(run)}, json, _show)
        return
    if what is None:
        raise LoramuxError(
            f"loramux jobs {run} {action.value}: name a {'file' if action is Action.add else 'job'}"
        )
    if action is Action.add:
        result = {"queued": str(enqueue(run, Path(what)))}
    else:
        if (action is Action.priority) != (value is not None):
            raise LoramuxError(
                "a number behind the job is its new priority; priority needs one, nothing else takes one"
            )
        result = ask(run, {"do": action.value, "job": what, "value": value})
    emit(result, json, lambda _: print(result.get("note") or f"{action.value} {what}: done"))


def enqueue(run: Path, file: Path) -> Path:
    """Put a job's file into the queue of a run, with its relative paths made absolute."""
    from loramux.recipe.load import placed_job

    if not run.is_dir():
        raise LoramuxError(
            f"{run} is no folder of a run; start one with loramux train RECIPE --out {run}"
        )
    text = placed_job(file)
    folder = run / "queue"
    folder.mkdir(exist_ok=True)
    target = folder / f"{file.stem}.yaml"
    if target.exists():
        raise LoramuxError(f"{target} is waiting already; choose another file name")
    part = folder / f".{file.stem}.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
    return target


def ask(run: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One request to the socket of a running run."""
    try:
        address = (run / "control" / "address").read_text(encoding="utf-8")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_SECONDS)
            connection.connect(address)
            connection.sendall(json_.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json_.loads(connection.makefile("rb").readline())
    except (OSError, ValueError):
        raise LoramuxError(
            f"nobody trains in {run} now, so there is nobody to ask; start or resume it with loramux train"
        ) from None
    if not answer.get("ok"):
        raise LoramuxError(str(answer.get("error")))
    return answer


def _listed(run: Path) -> list[dict[str, Any]]:
    """From the run itself, or from its last state where it does not run."""
    if (run / "control" / "address").exists():
        try:
            found: list[dict[str, Any]] = ask(run, {"do": "list"})["jobs"]
            return found
        except LoramuxError:
            pass  # killed, its folder left behind
    folder = run / "checkpoints"
    states = sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not states:
        raise LoramuxError(
            f"{run} holds no joint run; one is started with `joint: true` in a recipe"
        )
    saved = json_.loads((states[-1] / "run.json").read_text(encoding="utf-8"))
    rows = [row for row in saved["jobs"] if "identity" in row]
    if not rows:
        raise LoramuxError(f"{run} is a run by turns; its jobs are in result.json when it ends")
    return [_row(row) for row in rows]


def _row(saved: dict[str, Any]) -> dict[str, Any]:
    result, state = saved["result"], saved["state"]
    if result is not None:
        return {
            "job": saved["name"],
            "status": result["status"],
            "step": result["steps"],
            "steps": result["num_steps"],
            "loss": result["train_loss"],
            "tokens_per_second": round(result["tokens_per_second"], 1),
            "reason": result["reason"],
        }
    losses = [entry["loss"] for entry in state["history"][-1:] if entry.get("loss") is not None]
    return {
        "job": saved["name"],
        "status": "paused" if saved["is_paused"] else "stopped",
        "step": state["step"],
        "loss": losses[0] if losses else None,
    }


def _show(result: dict[str, Any]) -> None:
    rows = result["jobs"]
    table("Jobs", COLUMNS, [[row.get(key) for key in COLUMNS] for row in rows])
