"""`loramux jobs RUN`: how the jobs of a joint run stand, and what is asked of them while it goes on."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.jobs_read import ask, describe, history_rows, standing
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
    "memory",
    "left_s",
    "reason",
)
LOG_ROWS = 20
NUMBERED = {"priority": "its new priority", "logs": "how many rows of its history"}


class Action(StrEnum):
    list = "list"
    show = "show"
    logs = "logs"
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
    value: Annotated[
        int | None, typer.Argument(metavar="N", help="The new priority; rows of logs.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw the table anew until the run ends.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """See and steer the jobs that `loramux train` trains together.

    Example: loramux jobs runs/many pause boolq
    """
    if action is Action.list:
        if watch:
            _watch(run)
        emit(standing(run), json, _show_all)
        return
    if watch:
        raise LoramuxError("--watch goes with the list of jobs; leave out what stands behind RUN")
    if what is None:
        raise LoramuxError(
            f"loramux jobs {run} {action.value}: name a {'file' if action is Action.add else 'job'}"
        )
    if value is not None and action.value not in NUMBERED:
        raise LoramuxError(
            f"{action.value} takes no number; behind a job, "
            + " and ".join(f"{verb} takes {meaning}" for verb, meaning in NUMBERED.items())
        )
    if action is Action.show:
        emit(describe(run, what), json, _show_one)
    elif action is Action.logs:
        rows = history_rows(run, what)
        emit(
            {"job": what, "history": rows},
            json,
            lambda _: _show_history(what, rows, value or LOG_ROWS),
        )
    elif action is Action.add:
        result: dict[str, Any] = {"queued": str(enqueue(run, Path(what)))}
        if not _is_running(run):
            result["note"] = (
                f"{what} waits in the queue; nobody trains in {run} now: go on with the command that started it"
            )
        emit(result, json, lambda _: print(result.get("note") or f"add {what}: done"))
    else:
        if action is Action.priority and value is None:
            raise LoramuxError("priority needs a number behind the job: its new priority")
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


def _is_running(run: Path) -> bool:
    from loramux.cli.jobs_read import is_running

    return is_running(run)


def _watch(run: Path) -> None:
    """Draw the table until the run ends; where there is no terminal a line now and then."""
    import time

    from rich.console import Console
    from rich.live import Live

    from loramux.train.joint.live import PER_SECOND, jobs_table, totals_line

    console = Console(stderr=True)
    found = standing(run)

    def drawn() -> Any:
        return jobs_table(found["jobs"], found["run"], console.height)

    if not console.is_terminal:
        while _is_running(run):
            console.print(totals_line(standing(run)["run"]), markup=False, highlight=False)
            time.sleep(10)
        return
    with Live(drawn(), console=console, auto_refresh=False, transient=True) as live:
        while _is_running(run):
            found = standing(run)
            live.update(drawn(), refresh=True)
            time.sleep(1 / PER_SECOND)


def _show_all(result: dict[str, Any]) -> None:
    rows = result["jobs"]
    table("Jobs", COLUMNS, [[row.get(key) for key in COLUMNS] for row in rows])
    run = result["run"]
    counts = ", ".join(f"{count} {status}" for status, count in run["jobs"].items())
    print(
        f"{counts}; round {run['round']}{'' if run['is_running'] else '; nobody trains here now'}"
    )


def _show_one(result: dict[str, Any]) -> None:
    for key, value in result["job"].items():
        print(f"{key:>18}  {'-' if value in (None, '') else value}")
    for event in result["events"]:
        print(f"{'round ' + str(event['round']):>18}  {event['what']}")


def _show_history(job: str, rows: list[dict[str, Any]], most: int) -> None:
    if not rows:
        print(f"{job} has no history yet")
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = rows[-most:]
    cells = [[_short(row.get(key)) for key in keys] for row in shown]
    table(f"{job}: the last {len(shown)} of {len(rows)} rows", keys, cells)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
