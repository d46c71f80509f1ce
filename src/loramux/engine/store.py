"""Adapters by name, from disk to memory to slots: registered for nothing, read while requests queue, pinned while used.

A name stands for a folder or for an adapter given from memory; it can be given to something else at any time. A
request wants names (`want`), waits until their contents are in memory, and then leases them: from there on it keeps
exactly those contents, in their slots, until it lets go. Contents are kept by digest, within one budget of bytes; what
nobody leases goes when room is needed, the longest unused first, and what an older request waits for is not taken by a
younger one.

One lock. Slots change only on the thread that calls this; the loader's thread reads folders and nothing else.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from torch import nn

from loramux.core.adapter import Adapter
from loramux.core.guards import check_name
from loramux.core.types import Site
from loramux.engine.content import Content, content_of, read_content
from loramux.engine.intake import LAST, Intake
from loramux.engine.leases import Lease, LeasedPart, StoreStats, Ticket, TicketState
from loramux.engine.loader import Job, run_job
from loramux.engine.names import Entry, Names
from loramux.engine.packing import Layout
from loramux.engine.request import Mix, Reason
from loramux.engine.tiers import Tiers
from loramux.ops.pool import SlotTable
from loramux.persist.base import BaseIdentity

__all__ = ["AdapterStore", "Lease", "LeasedPart", "StoreStats", "Ticket", "TicketState"]


class AdapterStore:
    """See the file. Make it before the model's linears are replaced.

    memory_bytes: contents in memory, those in slots included; one more can be under way while it waits for room.
    slot_bytes, max_slots: contents in slots, one slot per expert.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        memory_bytes: int,
        slot_bytes: int,
        max_slots: int,
        table: SlotTable,
        check_base: bool = True,
    ):
        self.layout = Layout(model, sites)
        self.tiers = Tiers(memory_bytes, slot_bytes, max_slots, table)
        self.memory, self.slots = self.tiers.memory, self.tiers.slots
        self._model, self._base, self._check_base = model, BaseIdentity(model), check_base
        self._lock = threading.RLock()
        self._names = Names()
        self._tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._intake = Intake(self._read, memory_bytes, self._lock, self._admit)
        self._changes = 0  # of what may make room
        self._order = self._num_leases = 0

    # --- Names ----------------------------------------------------------------------------------

    def register(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Give the name to a folder without looking at it; errors in it become errors of the requests for it."""
        check_name(name)
        with self._lock:
            self._give(Entry(name, Path(folder)))

    def add(self, name: str, source: str | os.PathLike[str] | Adapter) -> str:
        """Give the name to a folder, read and checked now, or to a copy of an adapter; returns the content's digest.

        Raises ValueError, with the name as it was, where the source is not sound or does not fit the budgets. A copy of
        an adapter stays in memory for as long as it has the name: it could not be read again.
        """
        check_name(name)
        if not isinstance(source, str | os.PathLike | Adapter):
            raise ValueError(
                f"an adapter is a folder or one of a handle's adapters (handle.adapters[NAME]), got {source!r:.80}"
            )
        if isinstance(source, Adapter):
            content, entry = content_of(self.layout, source), Entry(name, None)
        else:
            job = Job(Path(source), LAST)
            run_job(job, self._read, self.memory.limit)
            if job.content is None:
                raise ValueError(job.error)
            content, entry = job.content, Entry(name, job.folder, identity=job.identity)
        entry.digest = content.digest
        with self._lock:
            never = self.tiers.why_never([content])
            if never is not None:
                raise ValueError(f"adapter {name!r} cannot be used: {never}")
            if not self._keep(content, LAST) and entry.folder is None:
                raise ValueError(
                    f"adapter {name!r} takes {content.nbytes:,} bytes; of the {self.memory.limit:,} for adapters in "
                    f"memory {self.memory.free:,} are free and the rest is in use. Raise memory_bytes, or save the "
                    "adapter and register its folder"
                )
            self._give(entry)
        return content.digest

    def remove(self, name: str) -> None:
        """Take a name back. Answers under way keep what they run with; requests still waiting for the name fail."""
        with self._lock:
            self._intake.abandon(self._names[name])
            self._sweep(self._names.remove(name))

    @property
    def base(self) -> BaseIdentity | None:
        """What folders are checked against; None where they are not."""
        return self._base if self._check_base else None

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self._names.entries)

    def __contains__(self, name: str) -> bool:
        return name in self._names.entries

    def size_of(self, name: str) -> int:
        """Bytes in memory of what the name stands for; 0 for a name nobody gave."""
        with self._lock:
            is_here = name in self and self._is_ready(self._names[name])
            return self._content(name).nbytes if is_here else 0

    def _give(self, entry: Entry) -> None:
        self._intake.abandon(self._names.entries.get(entry.name))
        self._sweep(self._names.put(entry))

    # --- Requests -------------------------------------------------------------------------------

    def want(self, mix: Mix) -> Ticket:
        """Start reading what is not in memory, or has changed on disk. Raises ValueError for names nobody gave."""
        with self._lock:
            entries = [self._names[name] for name, _ in mix]
            self._pump()  # what is wrong with an older version of a folder is not this request's
            self._order += 1
            self._changes += 1
            ticket = Ticket(mix, self._order, self._state, self._is_crowded)
            self._tickets.add(ticket)
            for entry in entries:
                self._notice(entry)
                self._ensure(entry, ticket)
            self._pump()
            return ticket

    def prefetch(self, names: Iterable[str]) -> None:
        """Read into memory, where there is room, what requests are expected to want."""
        with self._lock:
            self._changes += 1
            for entry in [self._names[name] for name in names]:
                self._notice(entry)
                self._ensure(entry, None)
            self._pump()

    def lease(self, wanted: Ticket | Mix) -> Lease | None:
        """Pin contents and slots; None: not now (loading, or slots in use). Raises ValueError if it never can be.

        Who waits should hold a ticket: without one, nothing is kept from younger requests.
        """
        with self._lock:
            ticket = wanted if isinstance(wanted, Ticket) else self.want(wanted)
            state = self._state(ticket)
            if state == "failed":
                raise ValueError(ticket.error)
            if state == "loading":
                return None
            contents = [self._content(name) for name, _ in ticket.mix]
            try:
                slots = self.tiers.acquire(contents)
            except ValueError as error:
                ticket.error, ticket.seen = f"{_listed(ticket)}: {error}", None
                self._drop(ticket)
                if ticket is wanted:
                    return None  # its state says why
                raise
            if slots is None:
                return None
            self._drop(ticket)
            self._num_leases += 1
            named = zip(ticket.mix, contents, slots, strict=True)
            return Lease(tuple(LeasedPart(name, c, w, own) for (name, w), c, own in named))

    def share(self, lease: Lease) -> Lease:
        """A second lease of the very same contents and slots, for another sample of a request."""
        with self._lock:
            assert not lease.is_released, "a released lease cannot be shared"
            slots = self.tiers.acquire([part.content for part in lease.parts])
            assert slots == [part.slots for part in lease.parts]
            self._num_leases += 1
            return Lease(lease.parts)

    def release(self, lease: Lease) -> None:
        """Let go. A second release of the same lease does nothing."""
        with self._lock:
            if lease.is_released:
                return
            lease.is_released = True
            self._num_leases -= 1
            contents = [part.content for part in lease.parts]
            self.tiers.release(contents)
            self._sweep(*(content.digest for content in contents))
            self._pump()

    def drop(self, ticket: Ticket) -> None:
        """The request is gone. Forgetting the ticket does the same."""
        with self._lock:
            self._drop(ticket)
            self._pump()

    def poll(self) -> None:
        """Take what has been read into memory, looking for room anew. Calls about requests do it too, at a change."""
        with self._lock:
            self._changes += 1
            self._pump()

    def wait(self, timeout_s: float) -> bool:
        """Block until something was read, at most so long; whether it was. For an engine with nothing else to do."""
        with self._lock:
            return self._intake.wait(timeout_s)

    def close(self) -> None:
        """Wait for the loader's thread to end. Leases stay valid; nothing is read any more."""
        self._intake.close()

    # --- Books ----------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                num_names=len(self._names.entries),
                num_contents=len(self.memory.residents),
                memory_bytes=self.memory.nbytes,
                memory_limit=self.memory.limit,
                num_slots_used=self.slots.num_used,
                num_slots_pinned=self.slots.num_pinned,
                num_slots=self.slots.max_slots,
                slot_bytes=self.slots.nbytes,
                slot_limit=self.slots.max_bytes,
                num_leases=self._num_leases,
                num_waiting=len(self._tickets),
                num_loads=self._intake.num_loads,
                num_failed_loads=self._intake.num_failed,
                num_memory_evictions=self.memory.evictions,
                num_slot_evictions=self.slots.evictions,
                last_load_s=self._intake.last_load_s,
            )

    def check_integrity(self) -> None:
        """The books of both tiers, and that they agree: what is in slots is in memory, pinned there as often."""
        with self._lock:
            self.tiers.check_integrity()
            self._names.check_integrity()
            self._intake.check_integrity()
            for digest, resident in self.memory.residents.items():
                assert resident.pins or self._names.is_named(digest), f"{digest} is nobody's"
            assert all(digest in self.tiers for digest in self._names.given)

    # --- Where a request stands -------------------------------------------------------------------

    def _state(self, ticket: Ticket) -> TicketState:
        with self._lock:
            self._pump()
            now = self._changes, self._intake.changes
            if ticket.seen != now:  # many wait, and are asked about in every step
                ticket.seen, ticket.last = now, self._look(ticket)
            return ticket.last

    def _look(self, ticket: Ticket) -> TicketState:
        if ticket.error is None:
            ticket.error = self._error(ticket)
        if ticket.error is not None:
            self._drop(ticket)
            return "failed"
        known = [entry for entry in self._entries(ticket) if entry is not None]
        if len(known) < len(ticket.mix):  # to make room, one of its own names was taken back
            return self._look(ticket)
        if all(map(self._is_ready, known)):
            return "ready"
        for entry in known:
            self._ensure(entry, ticket)
        self._pump()
        return "loading"

    def _error(self, ticket: Ticket) -> str | None:
        """Why the request can never have its adapters, as far as is known by now."""
        for (name, _), entry in zip(ticket.mix, self._entries(ticket), strict=True):
            job = ticket.jobs.get(name)
            if entry is None:
                return f"adapter {name!r} was removed while a request was waiting for it"
            if not self._is_ready(entry) and job is not None and self._intake.has_failed(job):
                return Reason(f"adapter {name!r}: {job.error}", getattr(job.error, "code", ""))
        never = self._why_never(self._known(ticket))
        return None if never is None else f"{_listed(ticket)}: {never}"

    def _entries(self, ticket: Ticket) -> list[Entry | None]:
        return [self._names.entries.get(name) for name, _ in ticket.mix]

    def _known(self, ticket: Ticket) -> list[Content]:
        """What has been read of its adapters: it is in memory, or at the door."""
        entries = [entry for entry in self._entries(ticket) if entry is not None]
        ready = [self._content(entry.name) for entry in entries if self._is_ready(entry)]
        return ready + [c for entry in entries if (c := self._intake.at_door(entry.job))]

    def _is_crowded(self, ticket: Ticket) -> bool:
        with self._lock:
            if self._state(ticket) != "loading":
                return False
            known = self._known(ticket)
            return (
                any(content.digest not in self.tiers for content in known)
                and all(other.order >= ticket.order for other in self._tickets)
                and self.tiers.num_missing(known, self._names.given) <= 0
            )

    def _why_never(self, contents: Collection[Content]) -> str | None:
        return self.tiers.why_never_beside(contents, lambda: self._names.given)

    def _is_ready(self, entry: Entry) -> bool:
        return not entry.is_stale and entry.digest in self.tiers

    def _content(self, name: str) -> Content:
        digest = self._names[name].digest
        assert digest is not None
        return self.tiers[digest]

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._changes += 1

    # --- From disk into memory --------------------------------------------------------------------

    def _notice(self, entry: Entry) -> None:
        """See whether the folder has changed, unless that is known and it is to be read anew."""
        if entry.job is None or not entry.is_stale:  # another name may bring what it held
            entry.look()

    def _ensure(self, entry: Entry, ticket: Ticket | None) -> None:
        if not self._is_ready(entry):
            self._intake.ensure(entry, ticket)

    def _read(self, folder: Path) -> Content:
        return read_content(self.layout, self._model, self._base, folder, self._check_base)

    def _pump(self) -> None:
        self._intake.pump(self._tickets, lambda: (self._changes, len(self._tickets)))

    def _admit(self, job: Job, entry: Entry) -> bool:
        """Take what was read into memory; False while there is no room for it."""
        if job.content is None:
            job.is_void = job.is_outdated  # repaired meanwhile: read it again
            return True
        never = self._why_never([job.content])
        if never is not None:
            job.error = f"it can never be used: {never}"
            return True
        if not entry.is_stale and entry.identity != job.identity:
            # What it held may be here by another name, and must not be kept for it.
            entry.is_stale, self._changes = True, self._changes + 1
        if not self._keep(job.content, job.order):
            return False
        self._sweep(self._names.was_read(entry, job.content.digest, job.identity))
        self._sweep(job.content.digest)  # its names may be gone by now
        return True

    def _keep(self, content: Content, order: int) -> bool:
        """Have a content in memory, evicting what a request of this age may; whether it is there now."""
        is_kept = self.tiers.keep(content, self._protected(order))
        self._changes += is_kept
        return is_kept

    def _protected(self, order: int) -> set[str]:
        """Contents that do not make room for a request of this age: given from memory, or wanted by one not younger."""
        kept = set(self._names.given)
        for ticket in self._tickets:
            if ticket.order <= order:
                entries = self._entries(ticket)
                kept.update(e.digest for e in entries if e and e.digest and not e.is_stale)
        return kept

    def _sweep(self, *digests: str | None) -> None:
        """Drop those of these contents that no name stands for and nobody leases."""
        self._changes += 1
        for digest in digests:
            if digest is not None and not self._names.is_named(digest):
                self.tiers.drop_unpinned(digest)


def _listed(ticket: Ticket) -> str:
    return " + ".join(repr(name) for name, _ in ticket.mix)
