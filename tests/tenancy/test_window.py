"""What is spent in any minute, under every order of reserving, settling and waiting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.tenancy.window import WINDOW_S, Window

LIMIT = 100


def test_an_amount_counts_for_a_minute_and_never_shorter():
    window = Window()
    window.reserve(100)
    window.settle(100, 100, 10.9, 11.0)
    assert not window.fits(1, LIMIT, 10.9 + 60)
    assert window.fits(100, LIMIT, 10 + 1 + WINDOW_S)


def test_what_is_reserved_counts_for_as_long_as_it_is_not_settled():
    window = Window()
    window.reserve(100)
    assert not window.fits(1, LIMIT, 10_000.0)
    window.settle(100, 100, 0.0, 10_000.0)
    assert window.fits(100, LIMIT, 10_000.0), "what started long ago is over"


def test_the_wait_is_how_long_until_the_amount_fits():
    window = Window()
    for second in (0.0, 5.0, 7.0):
        window.reserve(30)
        window.settle(30, 30, second, second)
    assert window.wait_s(10, LIMIT, 8.0) == 0.0
    wait = window.wait_s(50, LIMIT, 8.0)
    assert wait == 6 + WINDOW_S - 8, "two of the three must be over"
    assert not window.fits(50, LIMIT, 8.0 + wait - 0.01)
    assert window.fits(50, LIMIT, 8.0 + wait)


def test_the_wait_is_unknown_where_only_settling_makes_room():
    window = Window()
    window.reserve(100)
    assert window.wait_s(1, LIMIT, 0.0) is None


STEPS = st.lists(
    st.tuples(
        st.floats(0, 40),  # time that passes
        st.integers(0, 60),  # wanted
        st.floats(0, 1),  # share of it that is used
        st.integers(0, 3),  # how many reservations are settled
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_what_starts_within_any_minute_is_never_more_than_the_limit(steps):
    window, now = Window(), 0.0
    is_open: list[tuple[float, int, int]] = []  # started, reserved, used
    spent: list[tuple[float, int]] = []
    for passed, wanted, share, num_settled in steps:
        now += passed
        if window.fits(wanted, LIMIT, now):
            window.reserve(wanted)
            is_open.append((now, wanted, int(share * wanted)))
        for _ in range(min(num_settled, len(is_open))):
            started, reserved, used = is_open.pop()
            window.settle(reserved, used, started, now)
            spent.append((started, used))
        window.check_integrity()
    spent += [(started, used) for started, _, used in is_open]
    for begin, _ in spent:
        inside = sum(used for started, used in spent if begin <= started <= begin + 60)
        assert inside <= LIMIT


@pytest.mark.parametrize("late_s", [0.0, 30.0, 59.0])
def test_settling_late_or_out_of_order_keeps_the_books(late_s):
    window = Window()
    for _ in range(50):
        window.reserve(2)
    for second in reversed(range(50)):
        window.settle(2, 1, float(second), 49.0 + late_s)
        window.check_integrity()
    # Those that started more than 61 seconds ago are over already.
    assert window.used(49.0 + late_s) == min(50, 50 - max(0, int(late_s) - 11))
