"""`timeline.jsonl` of a joint run: what every job did in every round, for the report.

One line per round: {"round", "start", "end" (seconds of the run, the time between two processes left out), "steps":
{job: [tokens, seconds]}, "waiting": [jobs], "paused": [jobs], "ended": {job: status}}. Between the end of a line and
the start of the next no job could step. Times differ from run to run; nothing that is trained reads them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener, StepEvent
from loramux.train.logs import keep_until

if TYPE_CHECKING:
    from loramux.train.joint.entry import Entry
    from loramux.train.joint.trainer import JointTrainer
    from loramux.train.trainer import Trainer

TIMELINE = "timeline.jsonl"


class Timeline(Listener):
    """Appends to the file. A resumed run drops the rounds that it repeats and goes on with their clock."""

    def __init__(self, folder: Path):
        self.path = folder / TIMELINE
        self._origin = 0.0
        self._known: dict[str, tuple[int, float]] = {}
        self._stepped: list[str] = []
        self._ended: dict[str, str] = {}

    def started(self, trainer: Trainer) -> None:
        keep_until(self.path, trainer.round, "round")
        last = _last(self.path)
        self._origin = time.monotonic() - float(last.get("end", 0.0))
        self._known = {entry.name: _spent(entry) for entry in _joint(trainer).entries.values()}

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self._stepped.append(event.job)

    def stopped(self, trainer: Trainer, job: str, status: str, reason: str) -> None:
        self._ended[job] = status

    def rounded(self, trainer: Trainer) -> None:
        run = _joint(trainer)
        if not self._stepped and not self._ended:
            return
        now = time.monotonic()
        row: dict[str, Any] = {
            "round": run.round,
            "start": self._clock(run.steps_since if self._stepped else now),
            "end": self._clock(now),
            "steps": {name: self._step(run.entries[name]) for name in self._stepped},
        }
        idle = [e for e in run.entries.values() if e.is_open and e.name not in row["steps"]]
        row["waiting"] = [entry.name for entry in idle if not entry.is_paused]
        row["paused"] = [entry.name for entry in idle if entry.is_paused]
        row["ended"] = self._ended
        self._stepped, self._ended = [], {}
        # At once: a state of this round may follow, and a run that goes on from it does not repeat the round.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n")

    def _clock(self, at: float) -> float:
        return round(at - self._origin, 4)

    def _step(self, entry: Entry) -> list[float]:
        """What it saw and the time it took since it was last asked."""
        tokens, seconds = _spent(entry)
        before = self._known.get(entry.name, (0, 0.0))
        self._known[entry.name] = tokens, seconds
        return [tokens - before[0], round(seconds - before[1], 5)]


def _joint(trainer: Trainer) -> JointTrainer:
    from loramux.train.joint.trainer import JointTrainer

    assert isinstance(trainer, JointTrainer)
    return trainer


def _spent(entry: Entry) -> tuple[int, float]:
    if entry.runner is not None:
        return entry.runner.state.tokens, entry.runner.state.seconds
    assert entry.result is not None
    return entry.result.tokens, entry.result.seconds


def _last(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(json.loads(lines[-1])) if lines else {}
