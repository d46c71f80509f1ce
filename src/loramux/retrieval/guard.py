"""Refuses profiles that would be near everything: samples come from the uploader and decide who gets traffic."""

from __future__ import annotations

from loramux.retrieval.background import Background
from loramux.retrieval.errors import ProfileError
from loramux.retrieval.index import Entry


def check_centrality(entry: Entry, background: Background) -> None:
    """Raise if the dense vector is nearer to the pool's mean than all but 1 in 1,000 of the pool's own."""
    direction = entry.profile.direction
    if background.central_limit is None or direction is None or background.mean is None:
        return
    found = background.centrality(direction)
    if found > background.central_limit:
        raise ProfileError(
            f"the samples of {entry.id!r} are unlike any one task: their mean has a cosine of {found:.3f} to the "
            f"middle of the pool, more than 99.9 % of adapters ({background.central_limit:.3f}); "
            "give samples of one task",
            "too_central",
        )
