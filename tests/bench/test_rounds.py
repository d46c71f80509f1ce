"""Rounds are fair: everyone once per round, in changing order, on the process's own CPU time."""

import gc
import time

from loramux.bench.rounds import cpu_seconds, interleave
from loramux.bench.table import Compared, compare

TITLES = {"a": "A", "a copy": "another A", "b": "B"}


def test_every_subject_runs_once_per_round_in_an_order_that_changes():
    calls = []

    def subject(name):
        def measure():
            calls.append(name)
            return float(len(calls))

        return measure

    seconds = interleave({name: subject(name) for name in "abc"}, 20, warmup=2)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 22
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
    assert all(len(times) == 20 for times in seconds.values())
    assert min(min(times) for times in seconds.values()) > 6  # the two warm-up rounds are dropped


def test_the_order_is_the_same_for_the_same_seed():
    def orders(seed):
        calls = []
        interleave({n: lambda n=n: calls.append(n) or 1.0 for n in "abcd"}, 5, seed=seed)
        return calls

    assert orders(3) == orders(3) != orders(4)


def test_waiting_is_not_counted_and_working_is():
    assert cpu_seconds(lambda: time.sleep(0.2)) < 0.1

    def work():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    assert cpu_seconds(work) >= 0.05


def test_no_collection_strikes_a_measurement_and_the_collector_is_back_afterwards():
    seen = []
    assert gc.isenabled()
    interleave({"a": lambda: seen.append(gc.isenabled()) or 1.0}, 2)
    assert seen == [False, False, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_rows_say_what_was_compared_and_leave_out_what_was_not_timed():
    seconds = {"a": [2.0] * 10, "a copy": [2.0] * 10, "b": [1.0] * 10}
    wanted = [
        Compared("decode", "b", "a", "milora/lora", "a copy"),
        Compared("control", "a copy", "a", None, "a copy"),
        Compared("decode", "absent", "a", None, "a copy"),
    ]
    first, control = (
        row.to_dict() for row in compare(seconds, TITLES, wanted, batch=8, per_call=4)
    )
    assert first["ratio"] == first["low"] == first["high"] == 0.5
    assert (first["variant"], first["reference"], first["batch"]) == ("B", "A", 8)
    assert (first["target"], first["verdict"], first["resolved"]) == (1.0, "met", True)
    assert first["ms"] == 250.0
    assert (control["verdict"], control["ratio"]) == ("control", 1.0)


def test_a_gain_within_the_controls_spread_is_not_claimed():
    seconds = {
        "a": [1.0] * 10,
        "a copy": [0.97, 1.03] * 5,
        "b": [0.98] * 10,
    }
    (row,) = compare(
        seconds,
        TITLES,
        [Compared("decode", "b", "a", "milora/lora", "a copy")],
        batch=1,
        per_call=1,
    )
    assert (row.verdict, row.resolved) == ("open", False)
