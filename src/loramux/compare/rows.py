"""Finished rows on disk: one line of JSON each, appended and flushed to the disk as soon as the row exists.

Why lines: a process that dies in the middle of a write costs at most the line it was writing. What follows the last
line break is such a rest; it is cut off before anything is appended, and its row is made again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramux.compare.schema import SuiteError

log = logging.getLogger(__name__)
ROWS, LOCK = "rows.jsonl", ".lock"
Row = dict[str, Any]


class RowStore:
    """The rows of one folder by id; of rows with one id the last one counts."""

    def __init__(self, folder: Path):
        self.path = folder / ROWS

    def read(self) -> dict[str, Row]:
        """Every whole row, oldest first. Raises SuiteError for a line that is no row."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        whole = data[: data.rfind(b"\n") + 1]
        rows: dict[str, Row] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["id"]] = row
            except (ValueError, KeyError, TypeError):
                raise SuiteError(
                    f"{self.path}:{number} is not a row of results; remove that line, its row is then made again"
                ) from None
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row so that it survives whatever happens next."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with open(self.path, "ab+") as file:
            self._cut_off_rest(file)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _cut_off_rest(self, file: Any) -> None:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        kept = self.path.read_bytes().rfind(b"\n") + 1
        log.warning("%s ends in half a line, from a run that was cut off; dropping it", self.path)
        file.truncate(kept)
        file.seek(kept)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one run at a time writes to a folder; a second one is refused."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SuiteError(
                f"{folder}: another run is writing to this folder; wait for it, or choose another folder"
            ) from None
        yield
