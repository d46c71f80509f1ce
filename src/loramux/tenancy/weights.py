"""Tells the engine what its tenants weigh, when a weight is new or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from loramux.tenancy.caller import Caller


class Front(Protocol):
    """`loramux.engine.aio.AsyncEngine`, or its stub."""

    async def call(self, function: Callable[[Any], Any]) -> Any: ...


class Weights:
    """One per engine. Costs one dictionary look-up where nothing changed."""

    def __init__(self, engine: Front) -> None:
        self._engine = engine
        self._told: dict[str, float] = {}

    async def apply(self, caller: Caller) -> None:
        """Call before each of the caller's requests: the engine then serves its tenant by `caller.weight`."""
        if self._told.get(caller.tenant, 1.0) == caller.weight:
            return
        # Noted first: requests that come meanwhile need not tell it again.
        before = self._told.get(caller.tenant, 1.0)
        self._told[caller.tenant] = caller.weight
        try:
            await self._engine.call(
                lambda engine: engine.set_tenant_weight(caller.tenant, caller.weight)
            )
        except BaseException:
            self._told[caller.tenant] = before
            raise
