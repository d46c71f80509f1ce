"""Traffic is what it says: Poisson gaps, Zipf shares, lengths within limits, the same for the same seed."""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.bench.workload import (
    Traffic,
    make_traffic,
    poisson_times,
    total_answer,
    zipf_shares,
)

SMALL = Traffic(requests=40, adapters=6, vocab=50, rate=4.0, prompt=(3, 9), answer=(2, 5))


def test_gaps_between_arrivals_are_exponential_with_the_mean_of_the_rate():
    times = poisson_times(5.0, 20_000, random.Random(3))
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.03)
    assert pstdev(gaps) == pytest.approx(0.2, rel=0.05)  # of an exponential: as large as the mean
    longer = sum(gap > 0.2 for gap in gaps) / len(gaps)
    assert longer == pytest.approx(math.exp(-1), abs=0.02)


def test_at_an_infinite_rate_everything_is_there_at_once():
    assert poisson_times(math.inf, 3, random.Random(0)) == [0.0, 0.0, 0.0]


@given(st.integers(1, 300), st.floats(0, 3))
def test_shares_fall_with_the_rank_by_the_power_law_and_sum_to_one(count, exponent):
    shares = zipf_shares(count, exponent)
    assert math.fsum(shares) == pytest.approx(1)
    for rank, share in enumerate(shares, 1):
        assert share == pytest.approx(shares[0] / rank**exponent)


def test_requests_follow_the_shares():
    traffic = Traffic(requests=20_000, adapters=4, vocab=2, prompt=(1, 1), answer=(1, 1))
    seen = Counter(arrival.adapter for arrival in make_traffic(traffic, 1))
    for adapter, share in enumerate(zipf_shares(4, 1.0)):
        assert seen[adapter] / 20_000 == pytest.approx(share, abs=0.015)


def test_requests_stay_within_the_limits_and_reach_them():
    made = make_traffic(replace(SMALL, requests=400), 5)
    assert {len(a.prompt) for a in made} == set(range(3, 10))
    assert {a.answer for a in made} == set(range(2, 6))
    assert {t for a in made for t in a.prompt} == set(range(50))
    assert [a.at for a in made] == sorted(a.at for a in made)
    assert total_answer(made) == sum(a.answer for a in made)


def test_the_same_seed_gives_the_same_requests_and_another_one_others():
    assert make_traffic(SMALL, 7) == make_traffic(SMALL, 7)
    assert make_traffic(SMALL, 7) != make_traffic(SMALL, 8)


def test_another_rate_brings_the_same_requests_at_other_times():
    slow, fast = (make_traffic(replace(SMALL, rate=rate), 7) for rate in (1.0, 2.0))
    assert [replace(a, at=0.0) for a in slow] == [replace(a, at=0.0) for a in fast]
    assert [a.at for a in slow] == pytest.approx([2 * a.at for a in fast])


def test_another_number_of_adapters_leaves_the_prompts_alone():
    few, many = (make_traffic(replace(SMALL, adapters=n), 7) for n in (1, 6))
    assert [(a.at, a.prompt, a.answer) for a in few] == [(a.at, a.prompt, a.answer) for a in many]
    assert {a.adapter for a in few} == {0} != {a.adapter for a in many}


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests": 0},
        {"adapters": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"zipf": -1.0},
        {"prompt": (0, 4)},
        {"answer": (5, 4)},
    ],
)
def test_impossible_traffic_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SMALL, **wrong)
