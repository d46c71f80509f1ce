"""`router:ramole`: the adapters that fit the prompt, weighed token by token by a trained RAMoLE router.

Why assembled here: the set is the caller's own for this prompt, so it has no version in the registry. Its name in the
engine is a digest of the adapters and the router; equal sets share one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
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

log = logging.getLogger(__name__)
MAX_JUDGED = 65536  # contents of which it is remembered whether they fit the router


class RamoleRouter:
    """`Services.extras["ramole"]`. `limit`: sets that stay in the engine's memory."""

    def __init__(self, router_folder: str | Path, limit: int = 32):
        from loramux.engine.ramole import RamolePool

        # Sets are prepared beforehand, from verified folders: the pool never looks one up by itself.
        self.pool = RamolePool(router_folder, _no_folder, limit=limit)
        self._fits: OrderedDict[str, bool] = OrderedDict()  # by digest, which says all that matters

    async def __call__(
        self, services: Services, config: ServerConfig, asked: str, caller: Any
    ) -> Plan:
        """The plan of a call: `config.retrieval.k` plain adapters, or the base where nothing fits."""
        found, allowed = await retrieve(services, config.retrieval, asked, caller)
        plain = {
            hit.id: 1.0
            for hit, fits in zip(
                found.hits,
                await self._judge(services, [allowed[hit.id] for hit in found.hits]),
                strict=True,
            )
            if fits
        }
        routing = {**describe(found, plain, allowed), "mode": RAMOLE}
        if found.hits and not plain:
            routing["reason"] = "none of the adapters that fit the prompt fits the router"
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

    async def _judge(self, services: Services, versions: Sequence[Any]) -> list[bool]:
        """Which of these can be experts. One that cannot must not keep the others from answering: it may be a
        stranger's, shared with everybody."""
        fits: dict[str, bool] = {}  # of this call: another one may drop what is remembered
        engine = None
        for digest, version in {version.digest: version for version in versions}.items():
            found = self._fits.get(digest)
            if found is None:
                engine = engine or await services.engine.call(lambda engine: engine)
                found = await asyncio.to_thread(self._can_be_expert, services, engine, version)
                self._fits[digest] = found
            fits[digest] = found
        while len(self._fits) > MAX_JUDGED:
            self._fits.popitem(last=False)
        return [fits[version.digest] for version in versions]

    def _can_be_expert(self, services: Services, engine: Any, version: Any) -> bool:
        from loramux.engine.ramole import assemble_for_engine

        if version.servability != "static":
            return False  # a mixture has a router of its own
        folder = services.registry.folder(version)
        try:
            assemble_for_engine(engine, {version.digest: folder}, self.pool.router)
        except (LoramuxError, ValueError) as error:
            log.warning("%s cannot be put under the router: %s", version.ref, error)
            return False
        return True


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
        holding = asyncio.ensure_future(
            services.engine.call(lambda engine: self._hold(services, engine, ids, adapter))
        )
        try:
            await asyncio.shield(holding)
            yield
        finally:
            # In a task of its own: a client may leave while the engine's thread is at it, and a set that stays held
            # keeps its memory for ever.
            await asyncio.shield(asyncio.ensure_future(self._let_go(services, holding)))

    async def _let_go(self, services: Services, holding: asyncio.Future[str]) -> None:
        await asyncio.wait([holding])
        if holding.cancelled() or holding.exception() is not None:
            return
        from loramux.engine.aio import EngineClosedError

        name = holding.result()
        with suppress(EngineClosedError):  # nothing is held any more
            await services.engine.call(lambda engine: self.router.pool.release(engine, name))

    def _hold(self, services: Services, engine: Any, ids: list[str], adapter: Any) -> str:
        # It may have left the pool since it was looked for.
        if adapter is None and ids not in self.router.pool:
            adapter = self._prepare(services, engine, ids)
        try:
            return self.router.pool.hold(engine, ids, adapter)
        except ValueError as error:
            log.warning("no room for a set of adapters under the router: %s", error)
            raise ApiError(
                "there is no room for another set of adapters at the moment; try again",
                code="overloaded",
                headers={"Retry-After": "1"},
            ) from None

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
