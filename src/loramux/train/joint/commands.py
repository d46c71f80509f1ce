"""What is asked of a running set of jobs, and the journal that makes a resumed run do it again in the same rounds.

Why a journal: which jobs share a call decides how sums are rounded. A run that was killed repeats the rounds since its
last state; it must take in, pause and cancel jobs where it did before, not when the request happens to be seen again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

What = Literal["add", "pause", "resume", "cancel", "priority"]


@dataclass(frozen=True)
class Command:
    """`value` is the resolved recipe of a job to add, or a new priority; plain JSON values."""

    what: What
    job: str
    value: Any = None


class Inbox(Protocol):
    """Where commands come from. Called on the training thread, between rounds."""

    @property
    def stays_open(self) -> bool:
        """Whether the run waits for more when every job has ended."""
        ...

    def poll(self) -> Sequence[Command]:
        """What was asked since the last call."""
        ...

    def answered(self, command: Command, problem: str) -> None:
        """A command was written down (problem is empty), or refused."""
        ...


class NoInbox:
    """Nobody asks anything."""

    stays_open = False

    def poll(self) -> Sequence[Command]:
        return ()

    def answered(self, command: Command, problem: str) -> None: ...


class Journal:
    """Commands by round, one JSON line each, on disk before they are obeyed. Without a folder nothing is kept."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[tuple[int, Command]] = []
        if path is not None and path.exists():
            self.rows = _read(path)

    @property
    def last(self) -> int:
        """The last round that is written down."""
        return max((number for number, _ in self.rows), default=0)

    def at(self, number: int) -> list[Command]:
        return [command for at, command in self.rows if at == number]

    def added(self, number: int) -> dict[str, Command]:
        """The jobs that were added up to a round, by name."""
        return {
            command.job: command
            for at, command in self.rows
            if at <= number and command.what == "add"
        }

    def append(self, number: int, command: Command) -> None:
        self.rows.append((number, command))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"round": number, **asdict(command)}, ensure_ascii=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[tuple[int, Command]]:
    """All whole lines; a last one that was cut short was not obeyed either, so it is taken off."""
    rows: list[tuple[int, Command]] = []
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            part = path.with_name(path.name + ".part")
            part.write_text("".join(kept), encoding="utf-8")
            part.replace(path)
            break
        rows.append((int(row["round"]), Command(row["what"], row["job"], row["value"])))
        kept.append(line + "\n")
    return rows
