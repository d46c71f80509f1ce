"""What a joint run says of its jobs: the run itself through its socket, or its folder where nobody trains."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from loramux.errors import LoramuxError

TIMEOUT_SECONDS = 40.0
KEYS = (
    "job",
    "status",
    "step",
    "steps",
    "loss",
    "val_loss",
    "tokens_per_second",
    "share",
    "memory",
    "left_s",
    "priority",
    "reason",
)


class NobodyError(LoramuxError):
    """No process trains in this folder."""


def ask(run: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One request to the socket of a running run."""
    place = run / "control" / "address"
    try:
        with _connect(place.read_text(encoding="utf-8")) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
    except PermissionError:
        raise LoramuxError(
            f"the run in {run} belongs to {_owner(place)}, who alone may ask it; what it has written is in its folders"
        ) from None
    except TimeoutError:
        raise LoramuxError(
            f"the run in {run} has not answered for {TIMEOUT_SECONDS:.0f} s; its process is stopped or the machine is "
            "very busy: try again"
        ) from None
    except (OSError, ValueError):
        raise NobodyError(
            f"nobody trains in {run} now, so there is nobody to ask; start or resume it with loramux train"
        ) from None
    if not answer.get("ok"):
        raise LoramuxError(str(answer.get("error")))
    return answer


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_SECONDS)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _owner(path: Path) -> str:
    import pwd

    for each in (path, *path.parents):
        try:
            number = each.stat().st_uid
        except OSError:
            continue
        try:
            return pwd.getpwuid(number).pw_name
        except KeyError:
            return f"user {number}"
    return "another user"


def is_running(run: Path) -> bool:
    try:
        ask(run, {"do": "list"})
    except NobodyError:
        return False
    return True


def standing(run: Path) -> dict[str, Any]:
    """{"jobs": [rows], "run": totals}, the same keys whether it runs or not."""
    try:
        answer = ask(run, {"do": "list"})
        rows, totals = answer["jobs"], {**answer["run"], "is_running": True}
    except NobodyError:
        state = _last_state(run)
        rows = [_row(row) for row in state["jobs"]]
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        totals = {"round": state["round"], "jobs": counts, "is_running": False}
    return {"jobs": [{key: row.get(key) for key in KEYS} for row in rows], "run": totals}


def describe(run: Path, name: str) -> dict[str, Any]:
    """{"job": its row, with its folder and adapter, "events": what happened to it}."""
    found = standing(run)["jobs"]
    row = next((row for row in found if row["job"] == name), None)
    if row is None:
        raise LoramuxError(f"no job named {name!r} in {run}; there are {[r['job'] for r in found]}")
    folder = run / name
    adapter = next(
        (folder / kind for kind in ("adapter", "best") if (folder / kind).is_dir()), None
    )
    row |= {"folder": str(folder), "adapter": None if adapter is None else str(adapter)}
    return {"job": row, "events": _events(run, name, row)}


def history_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a job's history: from the run while it trains the job, else from the job's folder."""
    rows = None
    try:
        rows = ask(run, {"do": "show", "job": name})["history"]
    except NobodyError:
        describe(run, name)  # says so if there is no such job
    path = run / name / "history.json"
    if rows is None and path.is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))
    return list(rows or [])


def _events(run: Path, name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked, and the rounds of its first and last step."""
    found = [
        {"round": each["round"], "what": _asked(each)}
        for each in _lines(run / "journal.jsonl")
        if each.get("job") == name
    ]
    rounds = [each["round"] for each in _lines(run / "timeline.jsonl") if name in each["steps"]]
    if rounds:
        found.append({"round": rounds[0], "what": "first step"})
        found.append({"round": rounds[-1], "what": f"step {row['step']}, {row['status']}"})
    return sorted(found, key=lambda event: event["round"])


def _asked(line: dict[str, Any]) -> str:
    what = {"add": "added", "pause": "paused", "resume": "resumed", "cancel": "cancelled"}
    if line["what"] == "priority":
        return f"priority {line['value']}"
    return what.get(line["what"], str(line["what"]))


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # it is being written
    return found


def _last_state(run: Path) -> dict[str, Any]:
    folder = run / "checkpoints"
    states = sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not states:
        if (run / "run.json").exists():
            raise LoramuxError(
                f"the run in {run} is loading its base and data, or was ended before its first state; there is nothing "
                "to show yet"
            )
        raise LoramuxError(
            f"{run} holds no joint run; one is started with `joint: true` in a recipe"
        )
    saved: dict[str, Any] = json.loads((states[-1] / "run.json").read_text(encoding="utf-8"))
    saved["jobs"] = [row for row in saved["jobs"] if "identity" in row]
    if not saved["jobs"]:
        raise LoramuxError(f"{run} is a run by turns; its jobs are in result.json when it ends")
    return saved


def _row(saved: dict[str, Any]) -> dict[str, Any]:
    row = {"job": saved["name"], "priority": saved["priority"], "reason": ""}
    result, state = saved["result"], saved["state"]
    if result is not None:
        speed = round(result["tokens_per_second"], 1)
        row |= {"status": result["status"], "step": result["steps"], "steps": result["num_steps"]}
        row |= {"loss": result["train_loss"], "val_loss": result["val_loss"], "left_s": 0.0}
        return row | {"tokens_per_second": speed, "reason": result["reason"]}
    losses = [entry["loss"] for entry in state["history"] if entry.get("loss") is not None]
    speed = state["tokens"] / state["seconds"] if state["seconds"] else 0.0
    row |= {"status": "paused" if saved["is_paused"] else "stopped", "step": state["step"]}
    row |= {"loss": losses[-1] if losses else None, "val_loss": state["best_loss"]}
    return row | {"tokens_per_second": round(speed, 1), "steps": saved.get("num_steps")}
