"""One item in a process of its own: `python -m loramux.compare.worker WORK.json`, with the result as a file beside it.

Why a process: its peak memory is its own, and a crash costs one row. It ends when its parent does, which it learns
from the end of its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

RESULT = "found.json"
USER_ERROR = 2


def main(path: Path) -> int:
    """Do what the file says: {"work", "folder", "folders"}. An error's message is the last line of standard error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    given = json.loads(path.read_text(encoding="utf-8"))
    threads = given["work"]["threads"]
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        found = carry_out(given)
    except ValueError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {' '.join(str(error).split())}\n")
        return USER_ERROR
    text = json.dumps(found, allow_nan=False)
    (path.parent / RESULT).write_text(text, encoding="utf-8")
    return 0


def carry_out(given: dict[str, Any]) -> dict[str, Any]:
    from loramux.compare.work import carry_out as do

    folders = {name: Path(folder) for name, folder in given["folders"].items()}
    return do(given["work"], Path(given["folder"]), folders)


def _end_with_parent() -> None:
    # Not sys.stdin, whose lock this thread would still hold when the interpreter shuts down.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
