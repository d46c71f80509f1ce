"""Which examples make up which batch, fixed in advance by one seed.

Why a whole plan and not a sampler with state: a run that is resumed needs only the number of the next batch, and
two runs with the same seed see the same rows in the same order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

# Rows are sorted by length inside pools of this many batches: little padding, still a random order.
POOL_BATCHES = 8


def plan_batches(
    lengths: Sequence[int],
    size: int,
    *,
    seed: int,
    epochs: float | None = None,
    num_batches: int | None = None,
    group_by_length: bool = True,
) -> list[list[int]]:
    """Indices by batch, for so many epochs (a fraction cuts the last one short) or exactly so many batches.

    Every epoch visits every row once; its last batch may be smaller.
    """
    if (epochs is None) == (num_batches is None):
        raise ValueError("give exactly one of epochs and num_batches")
    if not lengths or size < 1:
        raise ValueError(f"cannot plan batches of {size} out of {len(lengths)} examples")
    per_epoch = math.ceil(len(lengths) / size)
    wanted = num_batches if num_batches is not None else math.ceil((epochs or 0) * per_epoch)
    rng = random.Random(seed)
    plan: list[list[int]] = []
    while len(plan) < wanted:
        plan += _epoch(lengths, size, rng, group_by_length)
    return plan[:wanted]


def _epoch(
    lengths: Sequence[int], size: int, rng: random.Random, group_by_length: bool
) -> list[list[int]]:
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if not group_by_length:
        return [order[s : s + size] for s in range(0, len(order), size)]
    batches: list[list[int]] = []
    pool = size * POOL_BATCHES
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [part[k : k + size] for k in range(0, len(part), size)]
    rng.shuffle(batches)
    return batches
