"""How the jobs of a running joint run stand, one row each: for `loramux jobs` and the live table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.train.joint.trainer import Entry, JointTrainer

COLUMNS = ("job", "status", "step", "steps", "loss", "tokens_per_second", "share", "left_s")


def rows(trainer: JointTrainer) -> list[dict[str, Any]]:
    """Read while the training thread goes on: every value is a plain one that it replaces as a whole.

    share: of the time that was spent in steps so far. left_s: at the pace so far, None before the first step.
    """
    entries = list(trainer.entries.values())
    total = sum(_seconds(entry) for entry in entries)
    return [_row(entry, total) for entry in entries]


def _seconds(entry: Entry) -> float:
    if entry.runner is not None:
        return entry.runner.state.seconds
    return 0.0 if entry.result is None else entry.result.seconds


def _row(entry: Entry, total: float) -> dict[str, Any]:
    runner, result = entry.runner, entry.result
    row: dict[str, Any] = {"job": entry.name, "priority": entry.priority, "reason": ""}
    if runner is None:
        assert result is not None
        row |= {"status": result.status, "step": result.steps, "steps": result.num_steps}
        row |= {"loss": result.train_loss, "left_s": 0.0, "reason": result.reason}
        row["tokens_per_second"] = round(result.tokens_per_second, 1)
    else:
        state = runner.state
        is_waiting = entry.is_paused and runner.is_running
        row |= {"status": "paused" if is_waiting else state.status}
        row |= {"step": state.step, "steps": runner.num_steps, "reason": state.reason}
        last = [entry["loss"] for entry in state.history[-1:] if "loss" in entry]
        row["loss"] = last[0] if last else None
        row["tokens_per_second"] = round(state.tokens / state.seconds, 1) if state.seconds else 0.0
        # By the clock, not by the job's own share of it: it waits for the others.
        done = state.step - entry.from_step
        pace = (time.monotonic() - entry.since) / done if done else None
        row["left_s"] = None if pace is None else round(pace * (runner.num_steps - state.step), 1)
    row["share"] = round(_seconds(entry) / total, 3) if total else 0.0
    return row
