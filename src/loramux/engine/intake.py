"""Which folders are still to be read, for whom, and in what order: the way from disk to the door of memory.

The oldest request's adapter is read first. What was read waits at the door until there is room; it is turned away, to
be read again, where an older request would have to wait behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from loramux.engine.content import Content
from loramux.engine.leases import Ticket
from loramux.engine.loader import Job, Loader, Read
from loramux.engine.names import Entry

LAST = 2**63 - 1  # the age of what no request waits for


class Intake:
    """Call it under `lock`. `admit(job, entry)` takes what was read into memory, or says that there is no room."""

    def __init__(
        self,
        read: Read,
        limit_bytes: int,
        lock: threading.RLock,
        admit: Callable[[Job, Entry], bool],
    ):
        self.jobs: dict[Job, Entry] = {}  # not done, and for whom
        self.num_loads = self.num_failed = 0
        self.last_load_s = 0.0
        self.changes = 0  # of what a request may find
        self._admit = admit
        self._running: Job | None = None  # with the loader, or at the door
        self._is_arrived = False
        self._arrival = threading.Condition(lock)
        self._tried: object = None  # when room was last looked for in vain
        self._loader = Loader(read, limit_bytes, self._arrive)

    def ensure(self, entry: Entry, ticket: Ticket | None) -> None:
        """See that an entry's folder is being read, or queued to be; without a ticket, whether or not anybody waits."""
        if entry.job is None:
            assert entry.folder is not None, "an adapter without a folder never leaves memory"
            entry.job = Job(entry.folder, LAST)
            self.jobs[entry.job] = entry
            self._tried = None
        if ticket is None:
            entry.job.is_prefetch = True
        else:
            if ticket.order < entry.job.order:
                entry.job.order, self._tried = ticket.order, None
            ticket.jobs[entry.name] = entry.job

    def abandon(self, entry: Entry | None) -> None:
        """The entry's name is given to something else: what is read for it is no use, nor is what is wrong with it."""
        if entry is not None and entry.job is not None:
            entry.job.is_void = True
            if entry.job is not self._running:
                self._forget(entry.job)

    def at_door(self, job: Job | None) -> Content | None:
        """What this job has read, where there was no room for it so far."""
        return (
            job.content if job is not None and job is self._running and self._is_arrived else None
        )

    def has_failed(self, job: Job) -> bool:
        """Whether what is wrong with its folder concerns those who waited for it; known once the loader is done."""
        return job.error is not None and not job.is_void and job is not self._running

    def pump(self, tickets: Iterable[Ticket], now: Callable[[], object]) -> None:
        """Let in what was read, start reading the next. `now()` must differ when there may be more room than before."""
        if not self.jobs or now() == self._tried:
            return
        before = now()  # a ticket may be forgotten while room is looked for
        if self._is_arrived and not self._let_in(tickets):
            self._tried = before
            return
        if self._running is None:
            self._reckon(tickets)
            job = min(self.jobs, key=lambda job: job.order, default=None)
            if job is not None:
                self._running = job
                self._loader.start(job)

    def wait(self, timeout_s: float) -> bool:
        """Block until something was read that nobody has looked at, at most so long; whether there is."""
        if self._running is not None and not self._is_new:
            self._arrival.wait(timeout_s)
        return self._is_new

    @property
    def _is_new(self) -> bool:
        return self._is_arrived and self._tried is None

    def close(self) -> None:
        """Call it without the lock: the loader's last job needs it."""
        self._loader.close()

    def check_integrity(self) -> None:
        for job, entry in self.jobs.items():
            assert entry.job is job, (entry, job)
        assert self._running is None or self._running in self.jobs
        assert self._running is not None or not self._is_arrived

    def _arrive(self, job: Job) -> None:
        """Called by the loader's thread."""
        with self._arrival:
            assert job is self._running
            self._is_arrived, self._tried = True, None
            self.changes += 1
            self._arrival.notify_all()

    def _let_in(self, tickets: Iterable[Ticket]) -> bool:
        """Clear the door, if what stands there has room or need not be waited for; whether the door is clear."""
        self._reckon(tickets)
        job = self._running
        assert job is not None
        is_done = job.is_void or self._admit(job, self.jobs[job])
        is_wanted = job.is_prefetch or job.order != LAST
        if not is_done and is_wanted and all(other.order >= job.order for other in self.jobs):
            return False
        job.content = None
        self.changes += 1
        self._running, self._is_arrived, self._tried = None, False, None
        if is_done:
            self.num_loads += 1
            self.num_failed += job.error is not None
            self.last_load_s = job.seconds
        if is_done or job.order == LAST:  # a prefetch in somebody's way is not read again and again
            self._forget(job)
        return True

    def _reckon(self, tickets: Iterable[Ticket]) -> None:
        """Note for whom each job is by now: who asked first may be gone. Forgets what nobody waits for."""
        orders: dict[Job, int] = {}
        for ticket in tickets:
            for job in ticket.jobs.values():
                orders[job] = min(ticket.order, orders.get(job, LAST))
        for job in list(self.jobs):
            job.order = orders.get(job, LAST)
            if job.order == LAST and not job.is_prefetch and job is not self._running:
                self._forget(job)

    def _forget(self, job: Job) -> None:
        self.jobs.pop(job).job = None
