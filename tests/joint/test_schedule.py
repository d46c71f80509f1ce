"""Schedulers are functions of what a run saves, and each keeps its promise."""

import itertools
import random
from typing import get_args

import pytest

from loramux.errors import RecipeError
from loramux.recipe import JointConfig, parse_recipe
from loramux.recipe.schema import READ_BY
from loramux.train.joint import Candidate
from loramux.train.joint.budget import TokenBudget
from loramux.train.joint.schedule import (
    Adaptive,
    ByPriority,
    Fifo,
    MinPad,
    least_padded,
    padding_of,
)
from loramux.train.joint.schedulers import MAKERS, make_scheduler


def job(name: str, arrival: int, length: int = 10, rows: int = 1, **more: int) -> Candidate:
    given = {"priority": 0, "last_round": 0, **more}
    return Candidate(name, arrival=arrival, tokens=rows * length, rows=rows, length=length, **given)


def some(draw: random.Random, count: int, rows: int = 2) -> list[Candidate]:
    return [
        job(f"j{i}", i, draw.randint(1, 60), rows, priority=draw.randint(0, 2))
        for i in range(count)
    ]


def test_the_window_rule_pads_no_more_than_the_best_of_all_subsets() -> None:
    draw = random.Random(0)
    for _ in range(200):
        jobs, slots = some(draw, draw.randint(1, 8)), draw.randint(1, 4)
        window = least_padded(jobs, slots)
        best = min(
            padding_of(chosen) for chosen in itertools.combinations(jobs, min(slots, len(jobs)))
        )
        assert len(window) == min(slots, len(jobs))
        assert padding_of(window) == best


def test_of_windows_with_equal_padding_the_more_important_and_then_the_older_wins() -> None:
    jobs = [job("a", 0, 10), job("b", 1, 10), job("c", 2, 20, priority=1), job("d", 3, 20)]
    assert MinPad(2).pick(1, jobs) == ["c", "d"]
    assert MinPad(2).pick(1, [job("d", 3, 20), job("c", 2, 20), *jobs[:2]]) == ["a", "b"]


def test_adaptive_always_takes_the_head_and_its_ends_are_priority_and_padding() -> None:
    draw = random.Random(1)
    for _ in range(200):
        jobs = some(draw, draw.randint(2, 9))
        head = min(jobs, key=lambda j: (-j.priority, j.arrival)).name
        for q in (0.0, 0.3, 0.7, 1.0):
            assert head in Adaptive(3, q).pick(1, jobs)
        assert Adaptive(3, 0.0).pick(1, jobs) == ByPriority(3).pick(1, jobs)
    apart = [job("head", 0, 50, priority=1), job("x", 1, 10), job("y", 2, 11), job("z", 3, 49)]
    assert Adaptive(2, 1.0).pick(1, apart) == ["head", "z"]


def test_fifo_and_priority_fill_their_slots_in_the_order_of_arrival() -> None:
    jobs = [job("c", 2), job("a", 0), job("b", 1, priority=3)]
    assert Fifo(2).pick(1, jobs) == ["a", "b"]
    assert ByPriority(2).pick(1, jobs) == ["b", "a"]


@pytest.mark.parametrize("objective", ["throughput", "turnaround", "fair"])
def test_a_job_never_waits_for_one_of_lower_priority(objective: str) -> None:
    draw = random.Random(2)
    for _ in range(100):
        jobs = some(draw, 7)
        budget = TokenBudget(objective, 150)  # type: ignore[arg-type]
        picked = budget.pick(1, jobs)
        room = 150
        for each in sorted(jobs, key=lambda j: -j.priority):
            higher = [j for j in jobs if j.priority > each.priority and j.name in picked]
            if sum(j.tokens for j in higher) + each.tokens > room:
                continue
            # What is left over by higher ones is spent on this class before any lower one.
            mine = [j for j in jobs if j.priority == each.priority and j.name in picked]
            lower = [j for j in jobs if j.priority < each.priority and j.name in picked]
            assert mine or not lower


def test_each_objective_takes_first_what_it_is_for() -> None:
    short = job("short", 0, steps_left=2, served=50)
    long = job("long", 1, steps_left=90, served=90)
    behind = job("behind", 2, steps_left=30, served=10)
    ready = [short, long, behind]
    for objective, first in (("turnaround", "short"), ("throughput", "long"), ("fair", "behind")):
        assert TokenBudget(objective, 10).pick(1, ready) == [first]  # type: ignore[arg-type]


def test_weighted_priorities_share_where_strict_ones_wait() -> None:
    high = job("high", 0, priority=1, served=100)
    low = job("low", 1, served=40)
    assert TokenBudget("fair", 10).pick(1, [high, low]) == ["high"]
    assert TokenBudget("fair", 10, "weighted").pick(1, [high, low]) == ["low"]
    ahead = job("low", 1, served=60)
    assert TokenBudget("fair", 10, "weighted").pick(1, [high, ahead]) == ["high"]


def test_nobody_starves_behind_a_higher_priority_and_it_does_not_wait_for_them() -> None:
    last = {"high": 0, "low": 0, "lower": 0}
    steps = dict.fromkeys(last, 0)
    budget = TokenBudget("fair", 10, patience=4)
    for number in range(1, 41):
        ready = [job(name, i, priority=2 - i, last_round=last[name]) for i, name in enumerate(last)]
        for name in budget.pick(number, ready):
            last[name] = number
            steps[name] += 1
    assert steps["high"] == 40
    assert steps["low"] >= 8
    assert steps["lower"] >= 8


def test_a_scheduler_is_a_function_of_the_jobs_and_not_of_their_order() -> None:
    draw = random.Random(3)
    for name in MAKERS:
        keys = {"round_tokens": 120} if name in READ_BY["round_tokens"] else {}
        scheduler = make_scheduler(JointConfig.model_validate({"scheduler": name, **keys}))
        for _ in range(20):
            jobs = some(draw, 6)
            first = scheduler.pick(5, jobs)
            assert first
            draw.shuffle(jobs)
            assert scheduler.pick(5, jobs) == first


def test_an_unknown_scheduler_or_size_is_refused_before_anything_is_loaded() -> None:
    for key, value, told in (
        ("scheduler", "mnpad", "minpad"),
        ("memory", "lots", "6GiB"),
        ("q", 1.5, "less than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match=rf"joint\.{key}.*{told}"):
            parse_recipe({"base": "nowhere", "joint": {key: value}})


def test_a_key_that_the_scheduler_does_not_read_is_refused_and_not_passed_over() -> None:
    set_apart = {"round_tokens": 99, "objective": "turnaround", "priorities": "weighted", "patience": 3,
                 "concurrency": 7, "q": 0.25}  # fmt: skip
    assert set_apart.keys() == READ_BY.keys()
    for key, value in set_apart.items():
        for name in MAKERS:
            given = {"base": "nowhere", "joint": {"scheduler": name, key: value}}
            if name in READ_BY[key]:
                before, after = (
                    make_scheduler(JointConfig.model_validate(each))
                    for each in ({"scheduler": name}, given["joint"])
                )
                assert before != after, f"{name} reads {key}"
            else:
                with pytest.raises(RecipeError, match=f"{key} is not for scheduler: {name}"):
                    parse_recipe(given)


def test_every_scheduler_of_the_schema_is_made() -> None:
    assert get_args(JointConfig.model_fields["scheduler"].annotation) == tuple(MAKERS)
