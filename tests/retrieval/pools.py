"""Pools to search: tasks with words of their own, an encoder without a network, and random profiles by the thousand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Query
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.text import NUM_BUCKETS, Sparse, counts, unit

DIM = 16
TOPICS = {
    "rivers": "which river flows through the valley bridge water delta stream",
    "chess": "white moves the queen knight bishop mate pawn opening board",
    "bread": "knead the dough oven yeast flour crust rise loaf salt",
    "law": "is this clause valid contract court party liable breach term",
    "stars": "how bright is the star orbit telescope planet nebula light year",
}


class WordEncoder:
    """Unit vectors from words: every bucket has a fixed random direction, so like texts lie near each other."""

    def __init__(self, dim: int = DIM, name: str = "words") -> None:
        self.id, self.dim, self.calls = f"{name}-{dim}", dim, 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls += len(texts)
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> NDArray[np.float32]:
        total = np.ones(self.dim)  # what all texts share
        for bucket, count in zip(*vars(counts(text)).values(), strict=True):
            total += count * np.random.default_rng(int(bucket)).standard_normal(self.dim)
        return unit(total)


def samples(topic: str, num: int = 20, seed: int = 0) -> list[str]:
    """Prompts of one task."""
    draw = random.Random(f"{topic}{seed}")
    words = TOPICS[topic].split()
    return [f"{' '.join(draw.sample(words, 5))} {draw.randrange(1000)}" for _ in range(num)]


def topic_profiles(encoder: WordEncoder | None = None) -> dict[str, Profile]:
    return {topic: make_profile(samples(topic), encoder) for topic in TOPICS}


def random_profile(
    draw: np.random.Generator, dim: int | None = DIM, encoder_id: str = "r"
) -> Profile:
    """Some hundred buckets with weights, and a direction."""
    size = int(draw.integers(5, 40))
    # Few buckets, so that profiles overlap.
    buckets = np.sort(draw.permutation(500)[:size]).astype(np.int32) * (NUM_BUCKETS // 500)
    values = unit(draw.uniform(0.1, 1.0, size)) * np.float32(0.9)
    seen = draw.integers(1, 20, size).astype(np.uint16)
    dense = (
        None if dim is None else unit(draw.standard_normal(dim)) * np.float32(draw.uniform(0.3, 1))
    )
    return Profile(Sparse(buckets, values), seen, dense, None if dim is None else encoder_id, 20)


def random_query(draw: np.random.Generator, dim: int | None = DIM) -> Query:
    profile = random_profile(draw, dim)
    return Query(profile.lexical, profile.direction)


def random_entries(num: int, seed: int = 0, dim: int | None = DIM) -> list[Entry]:
    """Entries of a few owners of very different size, each with a kind."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(num):
        owner = f"tenant{int(num ** draw.uniform(0, 0.5))}"
        readers = ("*",) if draw.random() < 0.1 else ()
        tags = {"base": f"base{i % 2}", "readers": readers}
        found.append(Entry(f"{owner}/a{i}@1", random_profile(draw, dim), owner, tags))
    return found
