"""What a request holds of the adapter store: a ticket while it waits, then a lease until its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from loramux.engine.content import Content
from loramux.engine.loader import Job
from loramux.engine.request import Mix

TicketState = Literal["loading", "ready", "failed"]


@dataclass(eq=False)
class Ticket:
    """Interest in the adapters of one request, from `want` until it is leased, dropped or forgotten.

    Read `state` on the engine's thread: looking moves what has been read into memory. `error` says why it failed.
    """

    mix: Mix
    order: int
    look: Callable[[Ticket], TicketState] = field(repr=False)
    look_for_room: Callable[[Ticket], bool] = field(repr=False)
    jobs: dict[str, Job] = field(default_factory=dict, repr=False)
    error: str | None = None
    seen: object = field(default=None, repr=False)  # what was so when `last` was found
    last: TicketState = field(default="loading", repr=False)

    @property
    def state(self) -> TicketState:
        return self.look(self)

    @property
    def is_crowded(self) -> bool:
        """Whether it would be ready if fewer adapters were leased: its own are read and no older request waits.

        Then letting no new request in until it is ready helps it for certain.
        """
        return self.look_for_room(self)


@dataclass(frozen=True, eq=False)
class LeasedPart:
    """One adapter of a lease: the name it was asked for by, its content, its slots (one per expert) and weight."""

    name: str
    content: Content
    weight: float
    slots: range


@dataclass(eq=False)
class Lease:
    """Contents pinned in memory and slots for one request, whatever happens to their names and folders."""

    parts: tuple[LeasedPart, ...]
    is_released: bool = False

    @property
    def answered(self) -> tuple[tuple[str, str, float], ...]:
        """(name, digest, weight) of every part."""
        return tuple((part.name, part.content.digest, part.weight) for part in self.parts)

    @property
    def is_chunkable(self) -> bool:
        return all(part.content.is_chunkable for part in self.parts)

    @property
    def is_shareable(self) -> bool:
        return all(part.content.is_shareable for part in self.parts)


@dataclass(frozen=True)
class StoreStats:
    """Numbers for people and logs. Bytes in memory include contents that are in slots."""

    num_names: int
    num_contents: int
    memory_bytes: int
    memory_limit: int
    num_slots_used: int
    num_slots_pinned: int
    num_slots: int
    slot_bytes: int
    slot_limit: int
    num_leases: int
    num_waiting: int
    num_loads: int
    num_failed_loads: int
    num_memory_evictions: int
    num_slot_evictions: int
    last_load_s: float
