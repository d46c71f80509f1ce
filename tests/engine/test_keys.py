"""Prefix keys and block hashes: equal exactly if everything that decides the blocks is equal."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.keys import PrefixKey, block_hash, extend_hashes

TEXT = st.text(alphabet="ab/:\0é", max_size=3)
WEIGHTS = st.sampled_from([0.0, 0.3, 0.5, 1.0, -1.0, 1e-300])
KEYS = st.builds(
    PrefixKey,
    salt=TEXT,
    base=TEXT,
    parts=st.lists(
        st.tuples(st.text(alphabet="ab", min_size=1, max_size=2), WEIGHTS), max_size=3
    ).map(tuple),
    router=TEXT,
    mask=TEXT,
)
TOKENS = st.lists(st.integers(0, 3), max_size=4)

KEY = PrefixKey(
    salt="tenant", base="base", parts=(("one", 0.7), ("two", 0.3)), router="router", mask="mask"
)


def variants(draw: random.Random) -> PrefixKey:
    """KEY with one to three of its fields drawn anew from a few values."""
    names = ["salt", "base", "router", "mask", "parts"]
    changes: dict[str, object] = {}
    for name in draw.sample(names, draw.randint(1, 3)):
        if name == "parts":
            parts = [
                (d, draw.choice([0.3, 0.7, 1.0])) for d in draw.sample(["one", "two", "three"], 2)
            ]
            changes[name] = tuple(parts[: draw.randint(0, 2)])
        else:
            changes[name] = draw.choice(["", name, name + "2", "tenant", "base"])
    return replace(KEY, **changes)


def test_ten_thousand_pairs_share_a_digest_only_if_they_are_equal():
    draw = random.Random(0)
    pairs = [(variants(draw), variants(draw)) for _ in range(12_000)]
    different = [(a, b) for a, b in pairs if a != b]
    assert len(different) >= 10_000
    assert not [pair for pair in different if pair[0].digest == pair[1].digest]
    tokens = [draw.randrange(100) for _ in range(16)]
    hashes = [(block_hash(a.digest, tokens), block_hash(b.digest, tokens)) for a, b in different]
    assert not [pair for pair in hashes if pair[0] == pair[1]]
    assert all(replace(a).digest == a.digest for a, _ in pairs)


@settings(max_examples=500, deadline=None)
@given(KEYS, KEYS)
def test_digests_are_equal_exactly_if_keys_are(first, second):
    assert (first.digest == second.digest) == (first == second)


@settings(max_examples=500, deadline=None)
@given(TEXT, TEXT, TOKENS, TOKENS)
def test_block_hashes_are_equal_exactly_if_parent_and_tokens_are(parent, other, tokens, others):
    is_equal = (parent, tokens) == (other, others)
    assert (block_hash(parent, tokens) == block_hash(other, others)) == is_equal


@pytest.mark.parametrize(
    "changed",
    [
        {"salt": "tenan"},
        {"base": "base "},
        {"parts": (("two", 0.3), ("one", 0.7))},
        {"parts": (("one", 0.3), ("two", 0.7))},
        {"parts": (("one", 0.7),)},
        {"parts": ()},
        {"router": ""},
        {"mask": "router", "router": "mask"},
        {"salt": "tenantbase", "base": ""},
    ],
)
def test_every_field_counts(changed):
    assert replace(KEY, **changed).digest != KEY.digest


def test_a_digest_can_stand_for_its_key_between_processes():
    assert PrefixKey(salt="s", base="b", parts=(("d", 0.5),)).digest == (
        "e85a97ce1ce1ce6a60899cb7dbe133458e7d57222f775b58327deca5b2bdc77a"
    )


def test_equal_weights_give_equal_digests_however_they_are_written():
    for one, other in ((1, 1.0), (0.0, -0.0)):
        first = PrefixKey(salt="", base="", parts=(("d", one),))
        second = PrefixKey(salt="", base="", parts=(("d", other),))
        assert first == second and first.digest == second.digest


def test_any_text_can_be_a_salt():
    assert PrefixKey(salt="\ud800", base="").digest != PrefixKey(salt="?", base="").digest


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"salt": None}, "salt must be text, got None"),
        ({"router": 3}, "router must be text, got 3"),
        ({"parts": (("", 1.0),)}, "needs the digest of its content"),
        ({"parts": (("d", "1"),)}, "must be a number, got '1'"),
        ({"parts": (("d", True),)}, "must be a number, got True"),
        ({"parts": (("d", float("nan")),)}, "must be finite, got nan"),
    ],
)
def test_what_cannot_be_part_of_a_key_is_refused(changed, text):
    with pytest.raises(ValueError, match=text):
        replace(KEY, **changed)


def test_hashes_of_a_chain_depend_on_everything_before():
    first, second = [], []
    extend_hashes(first, KEY.digest, [1, 2, 3, 4, 5, 6], 3, 2)
    extend_hashes(second, KEY.digest, [1, 9, 3, 4, 5, 6], 3, 2)
    assert len(set(first) | set(second)) == 6


def test_hashes_grow_with_the_tokens_and_keep_what_they_have():
    grown, whole = [], []
    extend_hashes(grown, "seed", [1, 2, 3], 1, 2)
    extend_hashes(grown, "seed", [1, 2, 3, 4, 5], 2, 2)
    extend_hashes(whole, "seed", [1, 2, 3, 4, 5], 2, 2)
    assert grown == whole == [block_hash("seed", [1, 2]), block_hash(whole[0], [3, 4])]
