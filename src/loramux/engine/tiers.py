"""Memory and slots together: what is in slots is in memory too, pinned there as often, and leaves both at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Literal

from loramux.engine.content import Content
from loramux.engine.memory import MemoryTier
from loramux.engine.slots import SlotTier
from loramux.ops.pool import SlotTable

Room = Literal["made", "later", "never"]


class Tiers:
    """Contents by digest. Not thread-safe.

    make_room: asked where contents given from memory leave so many bytes too few for others; says whether a name was
    taken back.
    """

    def __init__(self, memory_bytes: int, slot_bytes: int, max_slots: int, table: SlotTable):
        self.memory = MemoryTier(memory_bytes)
        self.slots = SlotTier(table, max_slots, slot_bytes)
        self.make_room: Callable[[int], Room] = lambda missing: "never"

    def __contains__(self, digest: str | None) -> bool:
        return digest in self.memory.residents

    def __getitem__(self, digest: str) -> Content:
        return self.memory.residents[digest].content

    def why_never(self, contents: Iterable[Content]) -> str | None:
        """Why these could not be used together even if nothing else was there; None if they could."""
        own = {content.digest: content for content in contents}
        nbytes = sum(content.nbytes for content in own.values())
        if nbytes > self.memory.limit:
            return (
                f"it takes {nbytes:,} bytes, the budget for adapters in memory is {self.memory.limit:,}; raise "
                "adapter_memory"
            )
        return self.slots.why_never(own.values())

    def why_never_beside(
        self, contents: Collection[Content], given: Callable[[], Iterable[str]]
    ) -> str | None:
        """As `why_never`, where contents given from memory stay; `make_room` is asked where these are in the way."""
        never = self.why_never(contents)
        while never is None:
            missing = self.num_missing(contents, given())
            if missing <= 0 or (room := self.make_room(missing)) == "later":
                return None
            if room == "never":
                nbytes = sum({content.digest: content.nbytes for content in contents}.values())
                held = missing + self.memory.limit - nbytes
                never = (
                    f"it takes {nbytes:,} bytes; of the {self.memory.limit:,} for adapters in memory {held:,} are held "
                    "by adapters given from memory for as long as they have their names; raise adapter_memory or "
                    "remove some of those"
                )
        return never

    def num_missing(self, contents: Iterable[Content], given: Iterable[str]) -> int:
        """Bytes by which these do not fit into memory beside contents given from memory; 0 or less where they do."""
        own = {content.digest: content.nbytes for content in contents}
        held = sum(self[digest].nbytes for digest in given if digest not in own)
        return sum(own.values()) + held - self.memory.limit

    def keep(self, content: Content, protected: Collection[str]) -> bool:
        """Have a content in memory, for which all but the pinned and the protected may go; whether it is there now."""
        if content.digest in self:
            return True
        leaving = self.memory.to_evict(content.nbytes, protected)
        if leaving is None:
            return False
        for digest in leaving:
            self._evict(digest)
        self.memory.put(content)
        return True

    def drop_unpinned(self, digest: str) -> None:
        """Forget a content, unless it is pinned or gone already."""
        if digest in self and not self.memory.residents[digest].pins:
            self._evict(digest)

    def acquire(self, contents: list[Content]) -> list[range] | None:
        """Pin contents of this memory in slots; None: no slots now. Raises ValueError as `SlotTier.acquire`."""
        slots = self.slots.acquire(contents)
        for content in contents if slots is not None else ():
            self.memory.pin(content.digest)
        return slots

    def release(self, contents: Iterable[Content]) -> None:
        """Undo one `acquire` of the same contents."""
        for content in contents:
            self.slots.release(content.digest)
            self.memory.unpin(content.digest)

    def check_integrity(self) -> None:
        self.memory.check_integrity()
        self.slots.check_integrity()
        residents = self.memory.residents
        for digest, seat in self.slots.seats.items():
            assert digest in residents, f"{digest} is in slots but not in memory"
            assert residents[digest].pins == seat.pins, digest
        lost = [d for d, r in residents.items() if r.pins and d not in self.slots.seats]
        assert not lost, f"pinned without slots: {lost}"

    def _evict(self, digest: str) -> None:
        self.slots.evict(digest)
        self.memory.drop(digest)
