"""Sequences that are not running: per tenant by arrival, between tenants by who was served least."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from loramux.engine.fairness import Shares
from loramux.engine.sequence import Sequence


class WaitingQueues:
    """One queue per tenant, ordered by Sequence.order: one that was preempted goes back to its old place."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def __contains__(self, sequence: Sequence) -> bool:
        queue = self._queues.get(sequence.tenant, [])
        at = bisect_left(queue, sequence.order, key=_order)
        return at < len(queue) and queue[at] is sequence

    def add(self, sequence: Sequence) -> None:
        insort(self._queues.setdefault(sequence.tenant, []), sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.tenant]
        at = bisect_left(queue, sequence.order, key=_order)
        assert queue[at] is sequence, "the sequence is not waiting"
        del queue[at]
        if not queue:
            del self._queues[sequence.tenant]

    def in_turn(self, shares: Shares) -> Iterator[Sequence]:
        """All of them: always the next one of the tenant served least so far, the older one among equals.

        Whoever takes a sequence out of the queue (or charges its tenant) before asking for the next one is heeded.
        """
        turns = [
            (shares[tenant].standing, queue[0].order, tenant, 0)
            for tenant, queue in self._queues.items()
        ]
        heapify(turns)
        while turns:
            _, _, tenant, at = heappop(turns)
            sequence = self._queues[tenant][at]
            yield sequence
            queue = self._queues.get(tenant, [])
            if at < len(queue) and queue[at] is sequence:
                at += 1
            if at < len(queue):
                heappush(turns, (shares[tenant].standing, queue[at].order, tenant, at))


def _order(sequence: Sequence) -> int:
    return sequence.order
