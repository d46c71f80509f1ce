"""Some of a large pool's adapters, contributors in turn, so that nobody's number decides what the sample looks like.

Why a limit besides turns: once everybody else has given all they have, a contributor of thousands would fill the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from hashlib import blake2b

CROWD = 8  # ours: with fewer contributors there is no telling whose profiles are the unusual ones
EQUAL_SHARES = 2  # ours: with one, a contributor of a single adapter would hold everybody to one


def in_turn(owned: Iterable[tuple[str, str]], most: int) -> list[str]:
    """At most so many of the ids, in rising order. owned: (id, contributor), in any order.

    Round after round every contributor gives one more, by the digest of the id. From 8 contributors on the rounds end
    before one of them would have given more than twice an equal share of all.
    """
    by_owner: dict[str, list[tuple[bytes, str]]] = defaultdict(list)
    for id, owner in owned:
        by_owner[owner].append((blake2b(id.encode(), digest_size=16).digest(), id))
    sizes = [len(own) for own in by_owner.values()]
    rounds = _rounds(sizes, most)
    turns = sorted(
        (turn, *one) for own in by_owner.values() for turn, one in enumerate(sorted(own)[:rounds])
    )
    return sorted(id for _, _, id in turns[:most])


def _rounds(sizes: list[int], most: int) -> int:
    """How many one contributor may give."""
    largest = max(sizes, default=0)
    if len(sizes) < CROWD:
        return min(largest, most)
    share, rounds = EQUAL_SHARES / len(sizes), 1
    while rounds < largest and _given(sizes, rounds) < most:
        if rounds + 1 > share * min(most, _given(sizes, rounds + 1)):
            break
        rounds += 1
    return rounds


def _given(sizes: list[int], rounds: int) -> int:
    return sum(min(size, rounds) for size in sizes)
