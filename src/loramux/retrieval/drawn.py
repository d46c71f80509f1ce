"""Prompts drawn from the profiles of a pool, and how well they fit it: what a threshold is calibrated on.

Why drawn: a profile keeps no samples, only in how many of them a bucket is and how much it weighs there. A drawn prompt
has each bucket as often as the samples have it, and is scored against its own profile as if it had not been one of
the samples. Buckets are drawn one by one, which real words are not; how near this comes is measured in
docs/retrieval.md.

Letters: P profiles, S draws of one profile, B buckets of one profile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Background
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile
from loramux.retrieval.segment import Segment
from loramux.retrieval.text import NUM_BUCKETS, Ints

Doubles: TypeAlias = NDArray[np.float64]
SHARED = 0.5  # ours: words of more than so many samples are the instruction, not the question


@dataclass(frozen=True, eq=False)
class Drawn:
    """Best lexical scores of drawn prompts. inside: over all profiles, the own one without this prompt. outside: over
    the others alone. with_instruction: whether a prompt has the words that most samples share."""

    inside: Doubles
    outside: Doubles
    with_instruction: NDArray[np.bool_]


def draw_scores(profiles: Sequence[Profile], background: Background, draws: int) -> Drawn:
    """`draws` prompts of each profile with its instruction and as many without, where these have any words left.

    Profiles of one sample have no other samples to be compared with: leave them out.
    """
    pool = Segment.of([Entry(str(i), p, "") for i, p in enumerate(profiles)], None)
    lengths_P = pool.lexical_lengths(background)
    draw = np.random.default_rng(int(digest_of(profiles, background)[:16], 16))
    inside: list[Doubles] = []
    outside: list[Doubles] = []
    kinds: list[bool] = []
    for number, profile in enumerate(profiles):
        others_PB = _weights_at(pool, profile.lexical.buckets, background) / lengths_P[:, None]
        others_PB[number] = 0.0
        for keeps in (True, False):
            prompt_SB, own_S = _held_out(profile, background, draws, keeps, draw)
            others_S = (prompt_SB @ others_PB.T).max(1)
            inside.append(np.maximum(own_S, others_S))
            outside.append(others_S)
            kinds += [keeps] * len(own_S)
    return Drawn(np.concatenate(inside), np.concatenate(outside), np.array(kinds, np.bool_))


def digest_of(profiles: Sequence[Profile], background: Background) -> str:
    """SHA-256 hex of all that the scores depend on."""
    digest = hashlib.sha256(background.idf.tobytes())
    for profile in profiles:
        digest.update(np.array([profile.num_samples, len(profile.seen)], np.int64).tobytes())
        for part in (profile.lexical.buckets, profile.lexical.values, profile.seen):
            digest.update(part.tobytes())
    return digest.hexdigest()


def _weights_at(pool: Segment, buckets: Ints, background: Background) -> Doubles:
    """TF-IDF weights [P, B] that the profiles have at these buckets."""
    place = np.full(NUM_BUCKETS, -1, np.int32)
    place[buckets] = np.arange(len(buckets), dtype=np.int32)
    column = place[pool.buckets]
    hit = column >= 0
    row = np.repeat(np.arange(len(pool)), np.diff(pool.starts))[hit]
    found = np.zeros((len(pool), len(buckets)))
    found[row, column[hit]] = pool.values[hit] * background.idf[pool.buckets[hit]]
    return found


def _held_out(
    profile: Profile, background: Background, draws: int, keeps: bool, draw: np.random.Generator
) -> tuple[Doubles, Doubles]:
    """Drawn prompts as TF-IDF vectors of length 1 [S, B], each with its cosine to the mean of the other samples."""
    number, buckets = profile.num_samples, profile.lexical.buckets
    seen = profile.seen.astype(np.float64)
    total_B = profile.lexical.values.astype(np.float64) * number
    each_B = total_B / seen
    has_SB = draw.random((draws, len(buckets))) < seen / number
    if not keeps:
        has_SB &= seen <= SHARED * number
    has_SB = has_SB[has_SB.any(1)]  # a prompt without words fits nothing
    idf_B = background.idf[buckets].astype(np.float64)
    prompt_SB = has_SB * (each_B * idf_B)
    prompt_SB /= np.linalg.norm(prompt_SB, axis=1, keepdims=True)
    rest_SB = (total_B - has_SB * each_B) * idf_B
    own_S = (prompt_SB * rest_SB).sum(1) / np.maximum(np.linalg.norm(rest_SB, axis=1), 1e-12)
    return prompt_SB, own_S
