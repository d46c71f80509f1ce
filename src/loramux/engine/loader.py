"""A thread that reads adapters while the engine runs: one job at a time; it ends when there has been none for a while.

Why one: reading is mostly Python, and two readers would take the interpreter from the engine twice as often.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loramux.engine.content import Content
from loramux.engine.request import Reason
from loramux.engine.sources import Identity, identity_of, settle, weight_bytes

IDLE_S = 5.0
ATTEMPTS = 5
CLOSED = "the adapter store was closed before it was read"
HEADERS = 2**24  # bytes of a folder's tensor files that need not be tensors

Read = Callable[[Path], Content]


@dataclass(eq=False)
class Job:
    """One folder to read. `order`: the number of the oldest request that waits for it; `is_void`: nobody does any more,
    the name it was wanted under stands for something else.

    Filled by the loader: `content` and the identity it was read under, or `error` and what the folder was then
    (`wrong_at`; None where it did not hold still).
    """

    folder: Path
    order: int
    is_prefetch: bool = False
    is_void: bool = False
    content: Content | None = None
    identity: Identity = ()
    error: str | None = None
    wrong_at: Identity | None = None
    seconds: float = 0.0

    @property
    def is_outdated(self) -> bool:
        """Whether the folder has changed since it was found to be wrong."""
        return self.wrong_at is not None and identity_of(self.folder) != self.wrong_at


class Loader:
    """Runs jobs handed to `start`; `done` is called from its thread, once per job."""

    def __init__(self, read: Read, limit_bytes: int, done: Callable[[Job], None]):
        self._read, self._limit, self._done = read, limit_bytes, done
        self._wake = threading.Condition()
        self._next: Job | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def start(self, job: Job) -> None:
        with self._wake:
            assert self._next is None, "one job at a time"
            if self._is_closed:
                self._refuse(job, CLOSED)
                return
            self._next = job
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, name="loramux-adapter-loader", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # the system has no thread left
                    self._next = None
                    self._refuse(job, f"no thread could be started to read it: {error}")
                    return
                self._thread = thread
            self._wake.notify_all()

    def close(self) -> None:
        """Waits for the job under way; later ones are not run."""
        with self._wake:
            self._is_closed = True
            thread = self._thread
            self._wake.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            try:
                run_job(job, self._read, self._limit)
            except (
                BaseException
            ) as error:  # such as a panic of a native reader: without this thread nobody is served
                job.error = Reason(f"reading it failed: {error!r:.200}", "")
            self._done(job)
            del job  # an idle thread must not keep the last content alive

    def _take(self) -> Job | None:
        with self._wake:
            if self._next is None and not self._is_closed:
                self._wake.wait(IDLE_S)
            job, self._next = self._next, None
            if job is not None and not self._is_closed:
                return job
            self._thread = None
        if job is not None:
            self._refuse(job, CLOSED)
        return None

    def _refuse(self, job: Job, error: str) -> None:
        job.error = error
        self._done(job)


def run_job(job: Job, read: Read, limit_bytes: int) -> None:
    """Read the folder into the job; whatever goes wrong becomes the job's error."""
    begin = time.perf_counter()
    try:
        for _ in range(ATTEMPTS):
            job.wrong_at = before = identity_of(job.folder)
            settle(before)
            size = weight_bytes(before)
            if size > 2 * limit_bytes + HEADERS:  # fp64 rows may become fp32
                raise ValueError(
                    f"{job.folder} holds {size:,} bytes in files of tensors, the budget for adapters in memory is "
                    f"{limit_bytes:,}; raise adapter_memory"
                )
            try:
                content = read(job.folder)
            except (ValueError, OSError):
                if identity_of(job.folder) == before:
                    raise
                continue  # read while it was being replaced
            if identity_of(job.folder) == before:
                job.content, job.identity = content, before
                return
        job.wrong_at = None
        raise ValueError(
            f"{job.folder} changed each of {ATTEMPTS} times it was read; write adapters beside and rename them"
        )
    except Exception as error:
        job.error = Reason(str(error) or type(error).__name__, getattr(error, "code", ""))
    finally:
        job.seconds = time.perf_counter() - begin
