"""A subject in a process of its own, asked for one measurement at a time.

Why: what one subject does to its process (memory that it keeps, kernels that it chose) must not help or hurt another.
The rounds stay interleaved, for the processes wait for one another.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from loramux.bench.rounds import Measure, quiet

PATIENCE = 30.0  # seconds that a process gets to end by itself


class Apart:
    """Calls a measure that `make(*args)` builds in another process; both are looked up there by name.

    Use as a context manager: the process ends with it.
    """

    def __init__(self, make: Callable[..., Measure], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> float:
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended can still be read
            self._pipe.send(None)
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process of a subject ended; is there enough memory?") from None
        if isinstance(found, str):
            raise RuntimeError(f"measuring in another process failed:\n{found}")
        return float(found)

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(pipe: Connection, make: Callable[..., Measure], args: tuple[Any, ...]) -> None:
    try:
        measure = make(*args)
        with quiet(), contextlib.closing(_Closable(measure)):
            while True:
                pipe.recv()
                pipe.send(measure())
                gc.collect()
    except EOFError:
        return  # nobody asks any more
    except Exception:
        pipe.send(traceback.format_exc())


class _Closable:
    """Closes what can be closed."""

    def __init__(self, measure: Measure):
        self.close: Callable[[], object] = getattr(measure, "close", lambda: None)
