"""Means, spreads and the paired bootstrap, against values worked out by hand."""

from math import comb, sqrt

import pytest

from loramux.compare.stats import mean_over_tasks, paired_bootstrap, row_error, spread


def test_a_task_with_more_rows_counts_no_more() -> None:
    assert mean_over_tasks({"a": [1.0, 0.0], "b": [1.0] * 10}) == 0.75


def test_the_error_over_rows_is_that_of_the_mean_over_tasks() -> None:
    # Var of [1, 0, 1, 0] with n - 1 is 1/3, so the error of its mean is sqrt(1/12); of a constant task 0.
    scores = {"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]}
    assert row_error([scores]) == pytest.approx(sqrt(1 / 12) / 2)


def test_rows_are_averaged_over_seeds_before_their_error_is_taken() -> None:
    seeds = [{"a": [1.0, 0.0]}, {"a": [0.0, 1.0]}]
    assert row_error(seeds) == 0.0
    assert spread([0.2, 0.4]) == pytest.approx(sqrt(0.02))
    assert spread([0.2]) is None


def test_the_bootstrap_of_four_rows_is_the_binomial_worked_out_by_hand() -> None:
    # Differences 1, 0, 0, 0: a resample's mean is Binomial(4, 1/4) / 4. P(0) = 0.316, and P(>= 3/4) = 0.051 > 0.025
    # with P(1) = 0.004: the middle 95 % is 0 to 0.75.
    ours, theirs = {0: {"a": [1.0, 1.0, 0.0, 1.0]}}, {0: {"a": [0.0, 1.0, 0.0, 1.0]}}
    found = paired_bootstrap(ours, theirs)
    assert found is not None
    assert (found.value, found.low, found.high) == (0.25, 0.0, 0.75)
    assert found.above == pytest.approx(1 - comb(4, 0) * 0.75**4, abs=0.02)
    assert found.says == "not separated"
    assert (found.wins, found.seeds) == (1, 1)


def test_equal_answers_have_no_difference_however_hard_the_rows() -> None:
    same = {0: {"a": [0.0, 1.0, 0.0]}, 1: {"a": [1.0, 1.0, 0.0]}}
    found = paired_bootstrap(same, same)
    assert found is not None
    assert (found.value, found.low, found.high, found.above) == (0.0, 0.0, 0.0, 0.0)


def test_a_clear_difference_is_called_above_and_its_mirror_below() -> None:
    good = {0: {"a": [1.0] * 19 + [0.0], "b": [1.0] * 20}}
    bad = {0: {"a": [0.0] * 20, "b": [0.0] * 10 + [1.0] * 10}}
    up, down = paired_bootstrap(good, bad), paired_bootstrap(bad, good)
    assert up is not None and down is not None
    assert (up.says, down.says) == ("above", "below")
    assert up.value == pytest.approx((0.95 + 0.5) / 2) == -down.value


def test_only_seeds_and_tasks_that_both_have_are_paired() -> None:
    ours = {0: {"a": [1.0], "b": [1.0]}, 1: {"a": [1.0], "b": [1.0]}}
    theirs = {1: {"a": [0.0]}, 2: {"a": [1.0]}}
    found = paired_bootstrap(ours, theirs)
    assert found is not None
    assert (found.value, found.seeds) == (1.0, 1)
    assert paired_bootstrap(ours, {5: {"a": [1.0]}}) is None


def test_other_test_rows_are_no_pair() -> None:
    with pytest.raises(ValueError, match="2 test rows against 3"):
        paired_bootstrap({0: {"a": [1.0, 1.0]}}, {0: {"a": [1.0, 1.0, 1.0]}})
