"""Intervals that hold what they promise, and verdicts that claim no more than the control allows."""

import random
from statistics import NormalDist

import pytest

from loramux.bench.stats import (
    Interval,
    is_resolved,
    median_interval,
    paired_ratio,
    ranks_of_interval,
    verdict,
)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # The tables of nonparametric statistics: 1-based ranks of the 95 % interval of a median.
    [(6, 1, 6), (10, 2, 9), (20, 6, 15), (30, 10, 21), (40, 14, 27), (60, 22, 39), (100, 40, 61)],
)
def test_the_interval_has_the_ranks_of_the_published_table(count, low, high):
    assert ranks_of_interval(count) == (low - 1, high - 1)


@pytest.mark.parametrize("count", range(1, 6))
def test_fewer_than_six_rounds_give_all_that_was_seen(count):
    assert ranks_of_interval(count) == (0, count - 1)


def test_no_rounds_give_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        ranks_of_interval(0)


@pytest.mark.parametrize("draw", ["normal", "skewed", "outliers"])
def test_the_interval_holds_the_true_median_in_95_of_100_experiments(draw):
    rng = random.Random(1)
    draws = {
        "normal": (lambda: rng.gauss(1.0, 0.1), 1.0),
        "skewed": (lambda: rng.lognormvariate(0.0, 0.5), 1.0),
        "outliers": (lambda: rng.gauss(1.0, 0.01) * (20 if rng.random() < 0.1 else 1), None),
    }
    sample, true = draws[draw]
    if true is None:  # a tenth lies far above, so the median is the 5/9 quantile of the rest
        true = NormalDist(1.0, 0.01).inv_cdf(5 / 9)
    tries = 1000
    held = sum(
        found.low <= true <= found.high
        for found in (median_interval([sample() for _ in range(30)]) for _ in range(tries))
    )
    # 95.7 % by the binomial for 30 rounds, give or take three standard deviations.
    assert 0.937 <= held / tries <= 0.977


def test_a_paired_ratio_does_not_see_drift_that_both_share():
    drift = [1.0 + 0.5 * i for i in range(30)]
    found = paired_ratio([1.2 * d for d in drift], drift)
    assert found.low == pytest.approx(1.2) and found.high == pytest.approx(1.2)


def test_a_disturbed_round_moves_nothing():
    rng = random.Random(0)
    ratios = [rng.gauss(1.0, 0.01) for _ in range(31)]
    calm = median_interval(ratios)
    ratios[ratios.index(max(ratios))] = 50.0
    assert median_interval(ratios) == calm


def test_unpaired_rounds_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("ratio", "control", "resolved"),
    [
        (Interval(0.98, 0.97, 0.99), Interval(1.0, 0.995, 1.004), True),
        (Interval(0.98, 0.97, 0.996), Interval(1.0, 0.995, 1.004), False),
        # A control that leans to one side may lean to the other next time.
        (Interval(0.98, 0.97, 0.99), Interval(1.01, 1.005, 1.02), False),
        (Interval(0.98, 0.97, 0.99), None, True),
        (Interval(1.0, 0.99, 1.01), None, False),
    ],
)
def test_what_lies_within_the_controls_spread_is_not_resolved(ratio, control, resolved):
    assert is_resolved(ratio, control) is resolved


def test_a_verdict_needs_the_whole_interval():
    assert verdict(Interval(1.05, 1.0, 1.1), 1.1) == "met"
    assert verdict(Interval(1.05, 1.0, 1.11), 1.1) == "open"
    assert verdict(Interval(1.2, 1.11, 1.3), 1.1) == "missed"
    assert verdict(Interval(1.2, 1.11, 1.3), None) == ""
