"""Jobs that arrive as files in a folder, while a run goes on or before it starts.

`queue/NAME.yaml` holds what an entry of `jobs:` may. It goes to `queue/taken/` once it is written down, or to
`queue/refused/` with the reason beside it. Write a file elsewhere and move it here: a rename is whole or not there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loramux.errors import LoramuxError
from loramux.recipe import JobRecipe
from loramux.train.joint.commands import Command

log = logging.getLogger(__name__)
QUEUE, TAKEN, REFUSED = "queue", "taken", "refused"
SUFFIXES = (".yaml", ".yml")


class QueueFolder:
    """`read` makes a job of a file; what it refuses is refused here.

    written: the jobs that the run has taken in, as they were written down. A run that was killed right after that finds
    the file again when it goes on; a second file of the same content that comes later is a second job.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[Path], JobRecipe],
        written: Callable[[], Sequence[Any]] = tuple,
    ):
        self.folder = folder
        self.read = read
        self.written = written
        self._files: dict[str, Path] = {}
        self._looked = False
        self._stuck: set[tuple[Path, int]] = set()

    @property
    def stays_open(self) -> bool:
        """Whether a job is waiting: a run whose jobs have all ended takes it in."""
        return bool(self._files) or bool(self._waiting())

    def poll(self) -> Sequence[Command]:
        found = []
        written = [] if self._looked else self.written()
        self._looked = True
        for path in self._waiting():
            try:
                job = self.read(path)
            except (LoramuxError, OSError) as error:
                self._put_away(path, str(error))
                continue
            value = job.model_dump(mode="json")
            if value in written:
                self._put_away(path, "")
                continue
            if job.name in self._files:
                self._put_away(path, f"another file of the queue is named {job.name!r}")
                continue
            self._files[job.name] = path
            found.append(Command("add", job.name, value))
        return found

    def answered(self, command: Command, problem: str) -> None:
        path = self._files.pop(command.job, None) if command.what == "add" else None
        if path is not None:
            self._put_away(path, problem)

    def note_refusal(self, name: str, problem: str) -> None:
        """Leave the reason where a job was taken in and then could not be trained."""
        folder = self.folder / REFUSED
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(problem + "\n", encoding="utf-8")

    def _waiting(self) -> list[Path]:
        known = set(self._files.values())
        return [
            path
            for age, path in _files_of(self.folder)
            if path not in known and (path, age) not in self._stuck
        ]

    def _put_away(self, path: Path, problem: str) -> None:
        if problem:
            log.warning("%s was refused: %s", path.name, problem)
        try:
            age = path.stat().st_mtime_ns
            self._stuck.add((path, age))  # not again, even if it cannot be moved
            folder = self.folder / (REFUSED if problem else TAKEN)
            folder.mkdir(exist_ok=True)
            os.replace(path, folder / path.name)
            self._stuck.discard((path, age))
            if problem:
                reason = (folder / path.name).with_suffix(".txt")
                reason.write_text(problem + "\n", encoding="utf-8")
        except FileNotFoundError:
            pass  # somebody took it away
        except OSError as error:
            log.warning("%s stays where it is: it cannot be moved (%s)", path, error.strerror)


def waiting_files(run: Path) -> list[Path]:
    """The files in the queue of a run's folder that nobody has read yet."""
    return [path for _, path in _files_of(run / QUEUE)]


def _files_of(folder: Path) -> list[tuple[int, Path]]:
    """(age, file), the oldest first. Hidden files are those that editors keep beside others."""
    found = []
    try:
        for path in folder.iterdir():
            is_named = not path.name.startswith(".") and path.suffix in SUFFIXES
            if is_named and path.is_file():
                found.append((path.stat().st_mtime_ns, path.name, path))
    except OSError:
        pass  # no folder, or a file that was taken away meanwhile: the next look sees it right
    return [(age, path) for age, _, path in sorted(found)]
