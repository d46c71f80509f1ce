"""Who is served next: tenants share by tokens served, not by how much they send.

Why: first come, first served gives everything to whoever floods. Each tenant has a counter of served tokens over its
weight, and the least one goes first (virtual token counters). Counters outlive idle times, so leaving and coming back
clears no debt. Asking for less than one's share earns a head start of so many tokens at most: a tenant none of whose
requests waits starts its next one no lower than that below the floor, which is what the last one admitted had been
served, or the least counter being served where that is more. So a tenant that sends little is answered at once, and
none can save up service, not even by an answer that never ends. Who comes for the first time starts at the floor:
tenants made on the spot gain nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Remembered tenants. Only those behind all others are forgotten; they come back as new ones, without a head start.
_FORGET_ABOVE = 16_384


@dataclass(eq=False)
class Share:
    """counter: tokens served over weight. pending: tokens of prompts under way that are not served yet.

    num_paused: steps in a row in which its answers made room for somebody's first token.
    """

    weight: float
    counter: float
    served: int = 0
    pending: int = 0
    num_unfinished: int = 0
    num_running: int = 0
    num_paused: int = 0

    @property
    def standing(self) -> float:
        """The counter as it will be once the prompts under way are done: one step may admit many."""
        return self.counter + self.pending / self.weight


class Shares:
    """The counters of all tenants. One of weight 2 gets twice the tokens; who is not in `weights` weighs 1.

    head_start: tokens that idle times can earn.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, head_start: int = 0) -> None:
        self._head_start = head_start
        self._weights: dict[str, float] = {}
        self._shares: dict[str, Share] = {}
        self._busy: dict[str, Share] = {}  # with unfinished work
        self._serving: dict[str, Share] = {}  # with running sequences
        self._floor = 0.0
        self._forget_above = _FORGET_ABOVE
        for tenant, weight in (weights or {}).items():
            self.set_weight(tenant, weight)

    def set_weight(self, tenant: str, weight: float) -> None:
        """From now on; what was served is not counted again."""
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"the weight of tenant {tenant!r} must be above 0 and finite, got {weight}"
            )
        self._weights.pop(tenant, None)
        if weight != 1:  # all others weigh 1 without being kept here
            self._weights[tenant] = float(weight)
        if tenant in self._shares:
            self._shares[tenant].weight = float(weight)

    def __getitem__(self, tenant: str) -> Share:
        """A tenant with unfinished work, or one that is remembered."""
        return self._shares[tenant]

    @property
    def busy(self) -> Mapping[str, Share]:
        """Tenants with unfinished work."""
        return self._busy

    def is_ahead(self, one: Share, other: Share) -> bool:
        """Whether `one` was served more than `other`, by more than a head start."""
        return one.counter - self._head_start / one.weight > other.counter

    def served(self) -> dict[str, int]:
        """Tokens served to each remembered tenant."""
        return {tenant: share.served for tenant, share in self._shares.items()}

    def enter(self, tenant: str) -> None:
        """The tenant has one more unfinished sequence."""
        share = self._shares.get(tenant)
        if share is None:
            share = Share(self._weights.get(tenant, 1.0), self._floor)
            self._shares[tenant] = share
        # Also one that runs: a small answer that never ends would save up all that its tenant does not ask for.
        if share.num_unfinished == share.num_running:
            least = self._floor - self._head_start / share.weight
            share.counter = max(share.counter, least)
        self._busy[tenant] = share
        share.num_unfinished += 1

    def leave(self, tenant: str) -> None:
        """One less. The counter stays: see the top of this file."""
        share = self._busy[tenant]
        share.num_unfinished -= 1
        if share.num_unfinished:
            return
        assert not share.num_running and not share.pending, f"tenant {tenant!r} still runs"
        del self._busy[tenant]
        if not self._busy:  # the next one to come starts where the last one left
            self._floor = max(self._floor, share.counter)
        if len(self._shares) > self._forget_above:
            self._forget()

    def start(self, tenant: str, pending: int) -> None:
        """One of the tenant's sequences runs now, with `pending` tokens to be served before it answers."""
        share = self._busy[tenant]
        # It had the least of those that waited, so nobody is owed more than that.
        self._floor = max(self._floor, share.counter)
        share.num_running += 1
        share.pending += pending
        self._serving[tenant] = share

    def stop(self, tenant: str, pending: int) -> None:
        """It runs no more, finished or preempted; `pending` of its tokens were not served."""
        share = self._busy[tenant]
        share.num_running -= 1
        share.pending -= pending
        assert share.num_running >= 0 and share.pending >= 0, f"tenant {tenant!r}: {share}"
        if not share.num_running:
            del self._serving[tenant]

    def charge(self, tenant: str, tokens: int, pending: int) -> None:
        """`tokens` were served, `pending` of them announced at start()."""
        share = self._busy[tenant]
        share.served += tokens
        share.counter += tokens / share.weight
        share.pending -= pending
        assert share.pending >= 0, f"tenant {tenant!r}: {share}"

    def settle(self) -> None:
        """After a step: who comes next starts no lower than the least of those being served."""
        # Those that only wait do not count: one that waits for long would let every newcomer start as low as it is.
        shares = self._serving or self._busy
        if shares:
            self._floor = max(self._floor, min(share.counter for share in shares.values()))

    def _forget(self) -> None:
        """Drop those who would start at the floor anyway, so that tenants may come and go for years."""
        self._shares = {
            tenant: share
            for tenant, share in self._shares.items()
            if tenant in self._busy or share.counter > self._floor
        }
        self._forget_above = max(_FORGET_ABOVE, 2 * len(self._shares))

    def check_integrity(self) -> None:
        for tenant, share in self._shares.items():
            assert min(share.num_unfinished, share.num_running, share.pending) >= 0, tenant
            assert share.num_running <= share.num_unfinished, tenant
            assert share.num_running or not share.pending, tenant
            assert bool(share.num_unfinished) == (tenant in self._busy), tenant
            assert bool(share.num_running) == (tenant in self._serving), tenant
