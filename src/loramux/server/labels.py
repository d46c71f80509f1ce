"""Which names get a metric label of their own: the K most used of any number, the rest are `other`.

Why: a label value is a time series for ever, and tenants choose the names. A name that has a label counts under it; it
is counted under `other` while it has none. Nothing is ever moved between the two, so every series only rises.
"""

from __future__ import annotations

from collections.abc import Callable

OTHER = "other"
_CANDIDATES = 4  # names watched, per label: the frequency sketch of Metwally et al. (Space-Saving)
_EVERY = 512  # uses between two looks at who deserves a label
_LEAD = 2  # a newcomer needs this many times the uses, so that two alike do not take turns


class TopLabels:
    """At most `k` names have a label at any moment. `on_drop(name)`: it has none any more. Not thread-safe."""

    def __init__(self, k: int, on_drop: Callable[[str], None] | None = None) -> None:
        self.k = k
        self._on_drop = on_drop
        self._held: set[str] = set()
        self._counts: dict[str, int] = {}
        self._uses = 0

    @property
    def names(self) -> list[str]:
        return sorted(self._held)

    def use(self, name: str) -> str:
        """Count one use; the label to count it under."""
        if self.k == 0:
            return OTHER
        self._watch(name)
        self._uses += 1
        if len(self._held) < self.k:
            self._held.add(name)
        elif self._uses % _EVERY == 0:
            self._reassign()
        return name if name in self._held else OTHER

    def _watch(self, name: str) -> None:
        counts = self._counts
        if name in counts:
            counts[name] += 1
        elif len(counts) < _CANDIDATES * self.k:
            counts[name] = 1
        else:
            # The newcomer inherits the least count: it may have been here before.
            least = min(counts, key=counts.__getitem__)
            counts[name] = counts.pop(least) + 1

    def _reassign(self) -> None:
        counts = self._counts
        rising = sorted((n for n in counts if n not in self._held), key=lambda n: (-counts[n], n))
        falling = sorted(self._held, key=lambda n: (counts.get(n, 0), n))
        for new, old in zip(rising, falling, strict=False):
            if counts[new] < _LEAD * (counts.get(old, 0) + 1):
                break
            self._held.discard(old)
            self._held.add(new)
            if self._on_drop is not None:
                self._on_drop(old)
        # Old fame fades, or a name that was busy once would keep its label.
        self._counts = {name: count // 2 for name, count in counts.items() if count > 1}
