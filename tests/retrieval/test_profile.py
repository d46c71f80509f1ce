"""Profiles: what is kept of samples, and that nothing else passes for one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from loramux.retrieval.errors import ProfileError
from loramux.retrieval.profile import (
    MAX_FEATURES,
    Profile,
    choose_samples,
    make_profile,
    mean_direction,
)
from loramux.retrieval.text import NUM_BUCKETS, bucket_of, counts, words
from retrieval.pools import WordEncoder, samples


def test_words_are_folded_and_cut() -> None:
    assert words("The  CAT, sat—on ﬁfty mats!") == ["the", "cat", "sat", "on", "fifty", "mats"]
    assert len(words("word " * 5000)) == 1024
    assert words("\ud800 lone surrogate") == ["lone", "surrogate"]
    assert counts("").buckets.size == 0


def test_buckets_are_the_same_on_every_machine() -> None:
    assert [bucket_of(gram) for gram in ("the", "the cat", "año")] == [147058, 177505, 136740]


def test_counts_hold_words_and_pairs_of_neighbours() -> None:
    found = counts("a b a b")
    expected = {bucket_of("a"): 2, bucket_of("b"): 2, bucket_of("a b"): 2, bucket_of("b a"): 1}
    assert dict(zip(found.buckets.tolist(), found.values.tolist(), strict=True)) == expected


def test_a_profile_survives_its_bytes() -> None:
    made = make_profile(samples("chess"), WordEncoder(), seed=3)
    data = made.to_bytes()
    read = Profile.from_bytes(data)
    assert (
        read.to_bytes() == data == make_profile(samples("chess"), WordEncoder(), seed=3).to_bytes()
    )
    np.testing.assert_array_equal(read.lexical.values, made.lexical.values)
    assert (read.encoder_id, read.num_samples, read.seed) == ("words-16", 20, 3)
    assert Profile.from_bytes(make_profile(samples("chess")).to_bytes()).dense is None


def test_no_text_is_kept() -> None:
    data = make_profile(samples("chess"), WordEncoder()).to_bytes()
    assert not any(word.encode() in data for word in ("queen", "knight", "bishop"))


def test_too_few_samples_are_refused_and_repeated_ones_count_once() -> None:
    with pytest.raises(ProfileError, match="9 samples were given; at least 10") as error:
        make_profile([*samples("chess", 9), " "])
    assert error.value.code == "too_few_samples"
    assert make_profile(["the same prompt"] * 12).num_samples == 1
    assert len(choose_samples(samples("law", 50), seed=1)) == 20
    assert choose_samples(samples("law", 50), 1) != choose_samples(samples("law", 50), 2)


@pytest.mark.parametrize(
    ("given", "words_of_error"),
    [
        ("one text", "list of texts"),
        ([1] * 20, "list of texts"),
        (["x" * 70_000] * 20, "sample 0 has 70000 characters"),
        (["!?"] * 20, "no words"),
    ],
)
def test_samples_that_make_no_profile_are_refused(given: list[str], words_of_error: str) -> None:
    with pytest.raises(ProfileError, match=words_of_error):
        make_profile(given)


def test_many_words_are_cut_to_the_heaviest() -> None:
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(100)) + " same" for _ in range(20)]
    made = make_profile(texts)
    assert len(made.lexical.buckets) == MAX_FEATURES
    assert bucket_of("same") in made.lexical.buckets


def test_sentence_vectors_without_direction_are_refused() -> None:
    with pytest.raises(ProfileError, match="length 0"):
        mean_direction(np.zeros((3, 4)))
    with pytest.raises(ProfileError, match="finite"):
        mean_direction(np.full((3, 4), np.nan))


def rewritten(**changes: object) -> bytes:
    data = make_profile(samples("chess"), WordEncoder()).to_bytes()
    tensors = load(data)
    note = {"loramux_profile": "1", "encoder": "words-16", "samples": "20", "seed": "0"}
    note.update(changes.pop("note", {}))  # type: ignore[call-overload]
    for name, array in changes.items():
        tensors[name.replace("_", ".", 1)] = array  # type: ignore[assignment]
    return save(tensors, metadata={"loramux_profile": json.dumps(note)})


SIZE = len(make_profile(samples("chess")).lexical.buckets)
RISING = np.arange(SIZE, dtype=np.int32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        b"\0" * (1 << 19),
        rewritten(note={"loramux_profile": "2"}),
        rewritten(note={"samples": "0"}),
        rewritten(note={"samples": "many"}),
        rewritten(note={"encoder": ""}),
        rewritten(note={"encoder": 5, "samples": [1]}),
        rewritten(lexical_buckets=RISING[::-1].copy()),
        rewritten(lexical_buckets=RISING + NUM_BUCKETS),
        rewritten(lexical_buckets=RISING - 1),
        rewritten(lexical_buckets=RISING.astype(np.int64)),
        rewritten(lexical_buckets=RISING[:5]),
        rewritten(lexical_values=np.full(SIZE, np.nan, np.float32)),
        rewritten(lexical_values=np.zeros(SIZE, np.float32)),
        rewritten(lexical_values=np.full(SIZE, 1e30, np.float32)),
        rewritten(lexical_seen=np.full(SIZE, 21, np.uint16)),
        rewritten(dense=np.zeros(16, np.float32)),
        rewritten(dense=np.full(16, np.inf, np.float32)),
        rewritten(dense=np.ones((4, 4), np.float32)),
        rewritten(dense=np.ones(16, np.float32)),
    ],
)
def test_bytes_that_are_no_profile_are_refused(data: bytes) -> None:
    with pytest.raises(ProfileError):
        Profile.from_bytes(data)


def test_damaged_bytes_are_refused_or_still_a_profile() -> None:
    data = make_profile(samples("chess"), WordEncoder()).to_bytes()
    draw = random.Random(0)
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        try:
            Profile.from_bytes(
                bytes(damaged[: draw.randrange(len(data)) if draw.random() < 0.2 else None])
            )
        except ProfileError:
            continue


def test_no_module_hides_a_public_name_of_the_package():
    import loramux.retrieval as package

    folder = Path(package.__file__).parent
    assert not {file.stem for file in folder.glob("*.py")} & set(package.__all__)
