"""`router:ramole`: the adapters that fit the prompt, weighed token by token by a trained RAMoLE router.

Why assembled here: the set is the caller's own for this prompt, so it has no version in the registry. Its name in the
engine is a digest of the adapters and the router; equal sets share one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.server.choosing import RAMOLE, describe, retrieve
from loramux.server.config import ServerConfig
from loramux.server.errors import ApiError
from loramux.server.resolve import Plan
from loramux.server.services import Services

if TYPE_CHECKING:
    from loramux.engine.ramole import RamolePool


class RamoleRouter:
    """`Services.extras["ramole"]`. `limit`: sets that stay in the engine's memory."""

    def __init__(self, router_folder: str | Path, limit: int = 32):
        from loramux.engine.ramole import RamolePool

        # Sets are prepared beforehand, from verified folders: the pool never looks one up by itself.
        self.pool = RamolePool(router_folder, _no_folder, limit=limit)

    async def __call__(
        self, services: Services, config: ServerConfig, asked: str, caller: Any
    ) -> Plan:
        """The plan of a call: `config.retrieval.k` plain adapters, or the base where nothing fits."""
        found, allowed = await retrieve(services, config.retrieval, asked, caller)
        # A mixture has a router of its own and cannot be an expert.
        plain = {hit.id: 1.0 for hit in found.hits if allowed[hit.id].servability == "static"}
        routing = {**describe(found, plain, allowed), "mode": RAMOLE}
        if found.abstained or not plain:
            return Plan(config.name, retrieved=found, routing=routing)
        versions = {allowed[key].digest: allowed[key] for key in plain}
        name = self.pool.name_of(versions)
        return Plan(
            f"router:{RAMOLE}",
            mix=((name, 1.0),),
            router=RAMOLE,
            router_digest=self.pool.router.digest,
            retrieved=found,
            routing=routing,
            assembled=Assembled(self, versions),
        )


def _no_folder(digest: str) -> Path:
    raise AssertionError(f"the set with {digest} was to be prepared before it is held")


@dataclass(frozen=True, eq=False)
class Assembled:
    """A set of adapters under the router. `versions`: by digest."""

    router: RamoleRouter
    versions: Mapping[str, Any]

    @asynccontextmanager
    async def held(self, services: Services) -> AsyncIterator[None]:
        """The engine knows the set for as long as this lasts."""
        pool: RamolePool = self.router.pool
        ids = sorted(self.versions)
        adapter = None
        if ids not in pool:
            engine = await services.engine.call(lambda engine: engine)
            adapter = await asyncio.to_thread(self._prepare, services, engine, ids)
        name = await services.engine.call(lambda engine: self._hold(services, engine, ids, adapter))
        try:
            yield
        finally:
            await services.engine.call(lambda engine: pool.release(engine, name))

    def _hold(self, services: Services, engine: Any, ids: list[str], adapter: Any) -> str:
        # It may have left the pool since it was looked for.
        if adapter is None and ids not in self.router.pool:
            adapter = self._prepare(services, engine, ids)
        return self.router.pool.hold(engine, ids, adapter)

    def _prepare(self, services: Services, engine: Any, ids: list[str]) -> Any:
        from loramux.engine.ramole import assemble_for_engine

        folders = {digest: services.registry.folder(self.versions[digest]) for digest in ids}
        try:
            return assemble_for_engine(engine, folders, self.router.pool.router)
        except LoramuxError as error:
            raise ApiError(
                "the adapters that fit the prompt do not fit this router",
                code="not_routable",
                status=400,
            ) from error
