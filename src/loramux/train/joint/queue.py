"""Jobs that arrive as files in a folder, while a run goes on or before it starts.

`queue/NAME.yaml` holds what an entry of `jobs:` may. It goes to `queue/taken/` once it is written down, or to
`queue/refused/` with the reason beside it. Write a file elsewhere and move it here: a rename is whole or not there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from loramux.errors import LoramuxError
from loramux.recipe import JobRecipe
from loramux.train.joint.commands import Command

log = logging.getLogger(__name__)
QUEUE, TAKEN, REFUSED = "queue", "taken", "refused"


class QueueFolder:
    """`read` makes a job of a file; what it refuses is refused here."""

    stays_open = False

    def __init__(self, folder: Path, read: Callable[[Path], JobRecipe]):
        self.folder = folder
        self.read = read
        self._files: dict[str, Path] = {}

    def poll(self) -> Sequence[Command]:
        found = []
        if not self.folder.is_dir():
            return ()
        # By age, then name: first come, first served.
        files = [path for path in self.folder.glob("*.yaml") if path not in self._files.values()]
        for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                job = self.read(path)
            except (LoramuxError, OSError) as error:
                self._put_away(path, str(error))
                continue
            if job.name in self._files:
                self._put_away(path, f"another file of the queue is named {job.name!r}")
                continue
            self._files[job.name] = path
            found.append(Command("add", job.name, job.model_dump(mode="json")))
        return found

    def answered(self, command: Command, problem: str) -> None:
        path = self._files.pop(command.job, None) if command.what == "add" else None
        if path is not None:
            self._put_away(path, problem)

    def _put_away(self, path: Path, problem: str) -> None:
        folder = self.folder / (REFUSED if problem else TAKEN)
        folder.mkdir(exist_ok=True)
        if path.exists():
            os.replace(path, folder / path.name)
        if problem:
            log.warning("%s was refused: %s", path.name, problem)
            (folder / path.name).with_suffix(".txt").write_text(problem + "\n", encoding="utf-8")
