"""An item in a process of its own, with a log, a time limit, and a reason when it ends without a result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loramux.compare.worker import RESULT

if TYPE_CHECKING:
    from loramux.compare.plan import Item

LOG, GIVEN = "log.txt", "work.json"


class ItemError(RuntimeError):
    """An item ended without a result."""


class Processes:
    """Does items in processes; leaving the block ends those that still run."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in list(self._running):
            process.kill()

    def __call__(
        self, item: Item, folder: Path, needs: Mapping[str, Path], limit: float | None
    ) -> dict[str, Any]:
        """What the item found. Raises ItemError with the last line of its log."""
        given = {
            "work": item.work,
            "folder": str(folder / "run"),
            "folders": {need: str(path / "run") for need, path in needs.items()},
        }
        (folder / GIVEN).write_text(json.dumps(given), encoding="utf-8")
        code = self._run(folder, limit)
        if code != 0:
            raise ItemError(_reason(code, folder / LOG))
        found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return found

    def _run(self, folder: Path, limit: float | None) -> int:
        command = [sys.executable, "-m", "loramux.compare.worker", str(folder / GIVEN)]
        with (
            open(folder / LOG, "wb") as log,
            # The pipe stays open as long as this process lives: its end tells the child to end.
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
        ):
            self._running.add(process)
            try:
                # Not communicate(): it would close the pipe.
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                raise ItemError(f"stopped after limit_minutes ({(limit or 0) / 60:g})") from None
            finally:
                process.kill()
                self._running.discard(process)


def _reason(code: int, path: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        more = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"ended by {name}{more}; see {path}"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with code {code} and no message"
