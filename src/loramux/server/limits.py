"""How many inference calls may run or wait: beyond that, an answer at once that says when to come again.

Why a share per tenant: a queue that one tenant may fill is closed to the others, however fair the engine is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from loramux.server.errors import ApiError

RETRY_S = 1
PROBES = frozenset({"/health", "/ready"})  # answered however busy the server is


class Gate:
    """Counts calls under way. Used by one event loop only."""

    def __init__(self, max_inflight: int, max_per_tenant: int | None = None):
        self.max_inflight = max_inflight
        self.max_per_tenant = max_per_tenant or max(1, max_inflight // 4)
        self.num_inflight = 0
        self.num_refused = 0
        self._by_tenant: Counter[str] = Counter()

    def check(self, tenant: str) -> None:
        """ApiError if there is no place for another call of this tenant: its own share is asked about first."""
        self.check_share(tenant)
        self.check_places()

    def check_share(self, tenant: str) -> None:
        """429 where the tenant's own calls take up its share, whatever others do."""
        if self._by_tenant.get(tenant, 0) >= self.max_per_tenant:
            self.num_refused += 1
            raise ApiError(
                f"you have {self.max_per_tenant} requests under way already; wait for one to end",
                code="too_many_requests", status=429, headers={"Retry-After": str(RETRY_S)},
            )  # fmt: skip

    def check_places(self) -> None:
        """503 where all places are taken."""
        if self.num_inflight >= self.max_inflight:
            self.num_refused += 1
            raise ApiError(
                "the server's queue is full; try again shortly",
                code="overloaded", headers={"Retry-After": str(RETRY_S)},
            )  # fmt: skip

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        """Hold a place for the time of a call, or refuse it."""
        self.check(tenant)
        self.num_inflight += 1
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self.num_inflight -= 1
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]  # tenants come and go; their names must not pile up

    def inflight_of(self, tenant: str) -> int:
        """Calls of one tenant under way."""
        return self._by_tenant.get(tenant, 0)
