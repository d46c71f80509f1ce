"""What the registry keeps of an adapter's training prompts: a lexical centroid and, with an encoder, a dense one.

Why no texts: prompts may be private. A profile holds hashed word counts and a mean vector, both averages over the
samples: enough to search with, too little to read. Who guesses a sample can still test the guess on them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.encoder import Encoder
from loramux.retrieval.errors import ProfileError
from loramux.retrieval.text import NUM_BUCKETS, Floats, Sparse, centroid, unit

NUM_SAMPLES = 20  # the paper's m
MIN_SAMPLES = 10  # with fewer, the right adapter is found clearly less often
MAX_FEATURES = 1024  # ours: bounds what one upload costs every search, and costs no accuracy
MAX_BYTES = 1 << 18
MAX_SAMPLE_CHARS = 1 << 16
_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Profile:
    """lexical: mean of unit term frequencies, no IDF yet. seen: in how many samples each bucket is. dense: mean of the
    unit sentence vectors, not renormalised; it belongs to `encoder_id`."""

    lexical: Sparse
    seen: NDArray[np.uint16]
    dense: Floats | None
    encoder_id: str | None
    num_samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def direction(self) -> Floats | None:
        """The dense mean at length 1."""
        return None if self.dense is None else unit(self.dense)

    def lexical_only(self) -> Profile:
        """The same profile without its dense half."""
        return replace(self, dense=None, encoder_id=None)

    def to_bytes(self) -> bytes:
        """One safetensors file; equal profiles give equal bytes."""
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {
            "lexical.buckets": self.lexical.buckets,
            "lexical.seen": self.seen,
            "lexical.values": self.lexical.values,
        }
        if self.dense is not None:
            tensors["dense"] = self.dense
        facts = {
            "loramux_profile": _FORMAT,
            "encoder": self.encoder_id or "",
            "samples": str(self.num_samples),
            "seed": str(self.seed),
        }
        # One note only: the order of several in the header is the library's, and it varies.
        return save(tensors, metadata={"loramux_profile": _note(facts)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Profile:
        """Read what `to_bytes` wrote; anything else is refused."""
        tensors, facts = _read(data)
        dense = tensors.get("dense")
        try:
            return cls(
                Sparse(
                    _typed(tensors["lexical.buckets"], np.int32),
                    _typed(tensors["lexical.values"], np.float32),
                ),
                _typed(tensors["lexical.seen"], np.uint16),
                None if dense is None else _typed(dense, np.float32),
                facts["encoder"] or None,
                int(facts["samples"]),
                int(facts["seed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            if isinstance(error, ProfileError):
                raise
            raise _unreadable(f"{type(error).__name__}: {error}") from None


def make_profile(
    samples: Sequence[str],
    encoder: Encoder | None = None,
    seed: int = 0,
    *,
    m: int = NUM_SAMPLES,
    minimum: int = MIN_SAMPLES,
) -> Profile:
    """The profile of `m` of the samples, drawn with `seed` after repeated ones were dropped.

    samples: raw prompts, without template and answers. Without an encoder the profile is lexical only.
    """
    chosen = choose_samples(samples, seed, m=m, minimum=minimum)
    lexical, seen = centroid(chosen)
    if len(lexical.buckets) == 0:
        raise ProfileError("the samples hold no words, so nothing could find this adapter by them")
    if len(lexical.buckets) > MAX_FEATURES:
        lexical, seen = _heaviest(lexical, seen)
    dense = None
    if encoder is not None:
        dense = mean_direction(encoder.encode(chosen))
    return Profile(lexical, seen, dense, None if encoder is None else encoder.id, len(chosen), seed)


def choose_samples(
    samples: Sequence[str], seed: int = 0, *, m: int = NUM_SAMPLES, minimum: int = MIN_SAMPLES
) -> list[str]:
    """At most m different samples, drawn at random; fewer than `minimum` given are an error."""
    if isinstance(samples, str) or not all(isinstance(text, str) for text in samples):
        raise ProfileError("samples must be a list of texts, one training prompt each")
    long = next((i for i, text in enumerate(samples) if len(text) > MAX_SAMPLE_CHARS), None)
    if long is not None:
        raise ProfileError(
            f"sample {long} has {len(samples[long])} characters; at most {MAX_SAMPLE_CHARS} are allowed, "
            "and only its first words would count"
        )
    given = [text.strip() for text in samples if text.strip()]
    if len(given) < minimum:
        raise ProfileError(
            f"{len(given)} samples were given; at least {minimum} are needed and {m} are best: prompts as a user would "
            "write them, without answers",
            "too_few_samples",
        )
    # After the count: some tasks have one prompt only, and only the choices differ.
    different = list(dict.fromkeys(given))
    return random.Random(seed).sample(different, min(m, len(different)))


def mean_direction(vectors: NDArray[Any]) -> Floats:
    """The mean of the vectors, each at length 1, so that no sample counts for more than another."""
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ProfileError("sentence vectors must be rows of finite numbers")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ProfileError("a sentence vector of length 0 points nowhere")
    found: Floats = (vectors / lengths).mean(0).astype(np.float32)
    return found


def _heaviest(lexical: Sparse, seen: NDArray[np.uint16]) -> tuple[Sparse, NDArray[np.uint16]]:
    kept = np.sort(np.argsort(-lexical.values, kind="stable")[:MAX_FEATURES])
    return Sparse(lexical.buckets[kept], lexical.values[kept]), seen[kept]


def _check(profile: Profile) -> None:
    buckets, values = profile.lexical.buckets, profile.lexical.values
    if not 0 < len(buckets) <= MAX_FEATURES or profile.seen.shape != buckets.shape:
        raise ProfileError(f"a profile has 1 to {MAX_FEATURES} buckets, got {len(buckets)}")
    if buckets[0] < 0 or buckets[-1] >= NUM_BUCKETS or (np.diff(buckets) <= 0).any():
        raise ProfileError(f"buckets must rise from 0 to at most {NUM_BUCKETS - 1}")
    if not (np.isfinite(values).all() and (values > 0).all() and (values <= 1.001).all()):
        raise ProfileError("the lexical values of a profile must lie above 0 and not above 1")
    if not 0 < profile.num_samples <= 1000:
        raise ProfileError(f"a profile is made of 1 to 1000 samples, got {profile.num_samples}")
    if profile.seen.min() < 1 or profile.seen.max() > profile.num_samples:
        raise ProfileError("a bucket is in at least 1 sample and in no more than there are")
    if (profile.dense is None) != (profile.encoder_id is None):
        raise ProfileError("a dense vector and the id of its encoder come together")
    if profile.dense is not None:
        length = float(np.linalg.norm(profile.dense)) if profile.dense.ndim == 1 else np.nan
        if not 1e-6 < length <= 1.001:
            raise ProfileError(
                f"the dense mean has length {length:.4g}; it must lie above 0 and not above 1"
            )


def _note(facts: dict[str, str]) -> str:
    import json

    return json.dumps(facts, sort_keys=True)


def _read(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    import json

    from safetensors import SafetensorError
    from safetensors.numpy import load

    if len(data) > MAX_BYTES:
        raise _unreadable(f"{len(data)} bytes, more than {MAX_BYTES}")
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        note = json.loads(data[8 : 8 + size])["__metadata__"]["loramux_profile"]
        facts = json.loads(note)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(f"{type(error).__name__}") from None
    if not isinstance(facts, dict) or facts.get("loramux_profile") != _FORMAT:
        raise _unreadable("not of a known version")
    return tensors, facts


def _typed(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    if array.dtype != dtype or array.ndim != 1:
        raise ProfileError(
            f"a part of the profile is {array.dtype} {array.shape}, not a row of {dtype}"
        )
    return array


def _unreadable(why: str) -> ProfileError:
    return ProfileError(f"these bytes are no profile ({why}); make one with make_profile(samples)")
