"""Which adapters the engine knows, by digest: given to it at first use, taken back when too many are known.

Why digests as names: a name in the engine then never changes its content, so an alias that moves concerns later
requests only, whatever runs.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from loramux.engine.aio import EngineClosedError


@dataclass(eq=False)
class _Entry:
    ready: asyncio.Future[None]
    pins: int = 0


class LoadedAdapters:
    """At most `limit` digests beside those in use. Used by one event loop only."""

    def __init__(self, engine: Any, folder_of: Callable[[Any], Any], limit: int):
        self._engine, self._folder_of, self._limit = engine, folder_of, limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    @asynccontextmanager
    async def pinned(self, versions: Sequence[Any]) -> AsyncIterator[None]:
        """The engine knows these versions for as long as this lasts."""
        held: list[_Entry] = []
        try:
            for version in versions:
                held.append(self._hold(version))
            for entry in held:
                await asyncio.shield(entry.ready)
            yield
        finally:
            for entry in held:
                entry.pins -= 1
            if len(self._entries) > self._limit:
                await self._evict()

    def _hold(self, version: Any) -> _Entry:
        entry = self._entries.get(version.digest)
        if entry is None:
            entry = _Entry(asyncio.ensure_future(self._give(version)))
            self._entries[version.digest] = entry
        entry.pins += 1
        self._entries.move_to_end(version.digest)
        return entry

    async def _give(self, version: Any) -> None:
        digest = version.digest
        try:
            # Verifying a folder's bytes takes a while; nothing else waits for it.
            folder = await asyncio.to_thread(self._folder_of, version)
            await self._engine.call(lambda engine: engine.add_adapter(digest, folder))
        except BaseException:
            self._entries.pop(digest, None)  # the next request tries again
            raise

    async def _evict(self) -> None:
        # Lazily: with thousands known, a look at each of them would be most of what a call costs.
        idle = (d for d, entry in self._entries.items() if not entry.pins and entry.ready.done())
        gone = list(islice(idle, len(self._entries) - self._limit))
        for digest in gone:
            del self._entries[digest]
        if gone:

            def remove(engine: Any) -> None:
                # Between here and the engine's thread a new request may have asked for one of them again.
                for digest in gone:
                    if digest not in self._entries:
                        engine.remove_adapter(digest)

            # Shielded: they are forgotten here already, so the engine must hear of it although a caller left.
            with suppress(EngineClosedError):  # nothing is known to it any more
                await asyncio.shield(asyncio.ensure_future(self._engine.call(remove)))
