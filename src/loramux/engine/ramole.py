"""RAMoLE in an engine: sets of retrieved adapters, each assembled once and kept under one name while it is wanted.

Why a pool: prompts that retrieve the same adapters share one content, so one prefix cache and one place in the slots;
a set that nobody uses any more must give its memory back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from loramux.core.adapter import Adapter
from loramux.core.values import check_whole
from loramux.engine.tiers import Room
from loramux.persist.ramole import Folder, TrainedRouter, assemble, pool_name, read_router

DEFAULT_SETS = 32


def assemble_for_engine(
    engine: Any, experts: Mapping[str, Folder], router: Folder | TrainedRouter, name: str = ""
) -> Adapter:
    """As `assemble`, for the model an engine serves, whose linears are replaced; give it to `engine.add_adapter`.

    It reads folders and what the engine knows of its model, and changes neither: any thread may call it.
    """
    store = engine.store
    return assemble(
        engine.model,
        experts,
        router,
        name=name or None,
        check_base=store.base is not None,
        sites=store.layout.sites,
        base=store.base,
    )


class RamolePool:
    """Names of assembled sets in one engine. `hold` and `release` belong on the engine's thread (`AsyncEngine.call`).

    folder_of: the local folder of an adapter's id; what an id stands for must never change. At most `limit` sets stay,
    more only while all of them are held: of the others the longest unused goes first, also where
    another request finds no room in memory. One pool per engine.
    """

    def __init__(
        self,
        router: Folder | TrainedRouter,
        folder_of: Callable[[str], Folder],
        *,
        limit: int = DEFAULT_SETS,
    ):
        check_whole("limit", limit)
        self.router = router if isinstance(router, TrainedRouter) else read_router(router)
        self.folder_of, self.limit = folder_of, limit
        self._held: OrderedDict[str, int] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._held)

    def name_of(self, ids: Iterable[str]) -> str:
        """The name a set has, whether or not it is there."""
        return pool_name(ids, self.router)

    def hold(self, engine: Any, ids: Iterable[str], adapter: Adapter | None = None) -> str:
        """See that the set is registered and keep it until `release`; returns its name for `Request(adapter=...)`.

        adapter: the set as `prepare` assembled it, so that the engine's thread need not.
        """
        ids = sorted(set(ids))
        name = self.name_of(ids)
        if name not in self._held:
            adapter = adapter or self.prepare(engine, ids)
            self._shrink(engine, self.limit - 1)
            self._add(engine, name, adapter)
        engine.store.tiers.make_room = partial(self._make_room, engine)
        self._held[name] = self._held.get(name, 0) + 1
        self._held.move_to_end(name)
        return name

    def release(self, engine: Any, name: str) -> None:
        """One holder less. The set stays for the next one, while there is room."""
        self._held[name] -= 1
        self._shrink(engine, self.limit)
        engine.store.poll()  # somebody may wait for the room of an idle set

    def prepare(self, engine: Any, ids: Iterable[str]) -> Adapter:
        """Read and check a set; any thread may call it."""
        return assemble_for_engine(engine, {id_: self.folder_of(id_) for id_ in ids}, self.router)

    def __contains__(self, ids: Iterable[str]) -> bool:
        return self.name_of(set(ids)) in self._held

    def _add(self, engine: Any, name: str, adapter: Adapter) -> None:
        """A set in memory stays there as long as it has its name: where there is no room, all idle ones make it."""
        try:
            engine.add_adapter(name, adapter)
        except ValueError:
            if not self._shrink(engine, 0):
                raise
            engine.add_adapter(name, adapter)

    def _make_room(self, engine: Any, missing: int) -> Room:
        """The longest unused idle set goes for a request that finds no room beside the sets in memory."""
        if sum(map(engine.store.size_of, self._held)) < missing:
            return (
                "never"  # other adapters given from memory are in the way: no set need go in vain
            )
        return "made" if self._shrink(engine, len(self._held) - 1) else "later"

    def _shrink(self, engine: Any, most: int) -> int:
        """Forget idle sets until at most so many are left; returns how many went."""
        idle = [name for name, holders in self._held.items() if holders == 0]
        gone = idle[: max(0, len(self._held) - most)]
        for name in gone:
            del self._held[name]
            if name in engine.store:  # `remove_adapter` is everybody's
                engine.remove_adapter(name)
        return len(gone)
