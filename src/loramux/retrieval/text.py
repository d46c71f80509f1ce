"""The lexical half: a text becomes hashed counts of its words and pairs of neighbouring words.

Why hashed: no vocabulary has to be shipped, kept in step or grown with the pool, and what is stored of a contributor's
samples is a list of bucket numbers. Standard library and NumPy only.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing import Any

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int32]
NUM_BUCKETS = 1 << 18
MAX_WORDS = 1024  # ours: what is longer is cut, so that no prompt costs more than its first words
# Ours, of a sample in a profile: with more, an uploader joins prompts of many tasks into one and is found for them all.
MAX_SAMPLE_WORDS = 32
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Sparse:
    """Buckets in rising order, each once, and a value for each."""

    buckets: Ints
    values: Floats

    def __post_init__(self) -> None:
        assert self.buckets.shape == self.values.shape


def words(text: str) -> list[str]:
    """Lower-case words of the text, compatibility forms folded together."""
    folded = unicodedata.normalize("NFKC", text[: 32 * MAX_WORDS]).casefold()
    return _WORD.findall(folded)[:MAX_WORDS]


def counts(text: str, most: int = MAX_WORDS) -> Sparse:
    """How often each bucket occurs: words and pairs of neighbours. Of longer texts the first and the last words count,
    `most` in all: what is asked stands at either end."""
    found = words(text)
    parts = [found] if len(found) <= most else [found[: most // 2], found[-(most // 2) :]]
    grams: Counter[str] = Counter()
    for part in parts:
        grams.update(part)
        grams.update(f"{a} {b}" for a, b in pairwise(part))
    held: Counter[int] = Counter()
    for gram, count in grams.items():
        held[bucket_of(gram)] += count
    order = sorted(held)
    return Sparse(
        np.array(order, dtype=np.int32), np.array([held[b] for b in order], dtype=np.float32)
    )


def bucket_of(gram: str) -> int:
    """The bucket of one word or pair; the same on every machine."""
    digest = blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little") % NUM_BUCKETS


def sublinear(found: Sparse) -> Sparse:
    """1 + ln(count): the tenth repetition of a word says little that the first did not."""
    return Sparse(found.buckets, (1.0 + np.log(found.values)).astype(np.float32))


def unit(values: NDArray[Any]) -> Floats:
    """The vector at length 1; a zero vector stays zero."""
    length = float(np.sqrt(np.square(values, dtype=np.float64).sum()))
    return (values / length if length > 0 else values).astype(np.float32)


def centroid(texts: Sequence[str]) -> tuple[Sparse, NDArray[np.uint16]]:
    """The mean of the texts' unit term-frequency vectors, and in how many texts each bucket occurs."""
    parts = [sublinear(counts(text, MAX_SAMPLE_WORDS)) for text in texts]
    buckets = np.concatenate([part.buckets for part in parts]) if parts else np.zeros(0, np.int32)
    values = [unit(part.values) for part in parts]
    kept, place = np.unique(buckets, return_inverse=True)
    sums = np.bincount(
        place, weights=np.concatenate(values) if values else None, minlength=len(kept)
    )
    seen = np.bincount(place, minlength=len(kept)).astype(np.uint16)
    return Sparse(kept.astype(np.int32), (sums / max(1, len(texts))).astype(np.float32)), seen
