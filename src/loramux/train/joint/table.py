"""How the jobs of a running joint run stand, one row each and all together: for `loramux jobs` and the live table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.train.joint.guard import resident_bytes

if TYPE_CHECKING:
    from loramux.train.joint.entry import Entry
    from loramux.train.joint.trainer import JointTrainer

MOST_LOOKS = 5  # at what another thread changes


def rows(trainer: JointTrainer) -> list[dict[str, Any]]:
    """Read while the training thread goes on: every value is a plain one that it replaces as a whole.

    share: of the time that was spent in steps so far. left_s: at the pace so far, None before the first step.
    """
    for _ in range(MOST_LOOKS):
        try:
            entries = list(trainer.entries.values())
            total = sum(_spent(entry)[1] for entry in entries)
            return [_row(trainer, entry, total) for entry in entries]
        except RuntimeError:  # a dictionary grew meanwhile: an optimizer's at its first step
            continue
    return []


def totals(trainer: JointTrainer) -> dict[str, Any]:
    """All jobs together: {"round", "jobs" (numbers by status), "tokens_per_second", "padding", "elapsed_s", "left_s"}.

    tokens_per_second: over the time spent in steps. elapsed_s: of this process. left_s: of the job that takes longest.
    """
    jobs = rows(trainer)
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job["status"]] = counts.get(job["status"], 0) + 1
    spent = [_spent(entry) for entry in list(trainer.entries.values())]
    seconds = sum(each[1] for each in spent)
    return {
        "round": trainer.round,
        "jobs": counts,
        "tokens_per_second": round(sum(s[0] for s in spent) / seconds, 1) if seconds else 0.0,
        "padding": trainer.calls.padding,
        "elapsed_s": round(time.monotonic() - trainer.since, 1),
        "left_s": max((job["left_s"] or 0.0 for job in jobs), default=0.0),
    }


def _spent(entry: Entry) -> tuple[int, float]:
    """(tokens, seconds) of its steps so far."""
    runner, result = entry.runner, entry.result
    if runner is not None:
        return runner.state.tokens, runner.state.seconds
    return (0, 0.0) if result is None else (result.tokens, result.seconds)


def _lacks_memory(trainer: JointTrainer, entry: Entry) -> bool:
    """Moved away, or not admitted yet."""
    return entry.is_held or (trainer.guard is not None and entry.name in trainer.guard.waiting)


def _memory(trainer: JointTrainer, entry: Entry) -> int | None:
    """Bytes above the base: what the job holds, and its largest call where that is predicted."""
    runner = entry.runner
    if runner is None:
        return None
    call = None if trainer.guard is None else trainer.guard.bytes_of(entry.name)
    return resident_bytes(runner) + (call or 0)


def _row(trainer: JointTrainer, entry: Entry, total: float) -> dict[str, Any]:
    runner, result = entry.runner, entry.result
    row: dict[str, Any] = {"job": entry.name, "priority": entry.priority, "reason": ""}
    if runner is None:
        assert result is not None
        row |= {"status": result.status, "step": result.steps, "steps": result.num_steps}
        row |= {"loss": result.train_loss, "left_s": 0.0, "reason": result.reason}
        row["val_loss"] = result.val_loss
        row["tokens_per_second"] = round(result.tokens_per_second, 1)
    else:
        state = runner.state
        row["status"] = state.status
        if runner.is_running and (entry.is_paused or _lacks_memory(trainer, entry)):
            row["status"] = "paused" if entry.is_paused else "held"
        row |= {"step": state.step, "steps": runner.num_steps, "reason": state.reason}
        if row["status"] == "held":
            row["reason"] = "until another job ends: there is no memory for it now"
        row["val_loss"] = state.best_loss
        row["loss"] = last_loss(state.history)
        row["tokens_per_second"] = round(state.tokens / state.seconds, 1) if state.seconds else 0.0
        # By the clock, not by the job's own share of it: it waits for the others.
        done = state.step - entry.from_step
        pace = (time.monotonic() - entry.since) / done if done else None
        row["left_s"] = None if pace is None else round(pace * (runner.num_steps - state.step), 1)
    row["memory"] = _memory(trainer, entry)
    row["share"] = round(_spent(entry)[1] / total, 3) if total else 0.0
    return row


def details(trainer: JointTrainer, name: str) -> dict[str, Any]:
    """One job: its row and its history so far."""
    row = next((row for row in rows(trainer) if row["job"] == name), None)
    if row is None:
        raise LoramuxError(f"no job named {name!r}; there are {list(trainer.entries)}")
    runner = trainer.entries[name].runner
    # An ended job's history lies in its folder.
    return {"job": row, "history": None if runner is None else list(runner.state.history)}


def last_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the last row that has one; rows of a validation alone have none."""
    return next((row["loss"] for row in reversed(history) if row.get("loss") is not None), None)
