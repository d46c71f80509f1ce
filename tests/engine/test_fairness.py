"""Shares of tenants: alone, and in the scheduler under unequal load."""

from __future__ import annotations

import random

import pytest

from engine.fake_runner import FakeRunner, tokens_of
from loramux.engine.admission import Limits
from loramux.engine.fairness import Shares


def simulate(arrivals, *, steps, weights=None, lengths=None, num_blocks=400):
    """Tokens served to each tenant while all of them have work. arrivals: requests per step and tenant."""
    lengths = lengths or {}
    runner = FakeRunner(
        num_blocks=num_blocks,
        limits=Limits(max_batch=6, max_step_tokens=32, max_chunk=16),
        weights=weights,
        has_cache=False,
    )
    due = dict.fromkeys(arrivals, 0.0)
    seed = 0
    for _ in range(steps):
        for tenant, rate in arrivals.items():
            due[tenant] += rate
            while due[tenant] >= 1:
                due[tenant] -= 1
                seed += 1
                prompt, answer = lengths.get(tenant, (8, 6))
                runner.add(tokens_of(seed, prompt), max_tokens=answer, tenant=tenant)
        runner.step()
    backlog = {s.tenant for s in runner.scheduler._waiting}
    assert backlog == arrivals.keys(), "the claim is about tenants that all have work waiting"
    return runner.scheduler.stats().served, runner


def test_a_tenant_that_sends_ten_times_more_is_served_the_same():
    served, _ = simulate({"loud": 10.0, "quiet": 1.0}, steps=300)
    assert served["quiet"] == pytest.approx(served["loud"], rel=0.03)


def test_the_loud_one_gains_nothing_by_being_first():
    served, runner = simulate({"loud": 10.0}, steps=100)
    before = served["loud"]
    for i in range(200):
        runner.add(tokens_of(i, 8), max_tokens=6, tenant="quiet")
    for _ in range(200):
        runner.step()
    served = runner.scheduler.stats().served
    assert served["quiet"] == pytest.approx(served["loud"] - before, rel=0.05)


def test_long_prompts_and_long_answers_count_by_their_tokens():
    lengths = {"long": (30, 10), "short": (2, 2)}
    served, _ = simulate({"long": 2.0, "short": 8.0}, steps=400, lengths=lengths)
    assert served["short"] == pytest.approx(served["long"], rel=0.05)


def test_weights_divide_the_service():
    weights = {"gold": 3.0, "plain": 1.0}
    served, _ = simulate({"gold": 3.0, "plain": 3.0}, steps=400, weights=weights)
    assert served["gold"] == pytest.approx(3 * served["plain"], rel=0.05)


def test_preempted_work_is_paid_for_once():
    served, runner = simulate({"a": 2.0, "b": 2.0}, steps=300, num_blocks=12)
    assert runner.scheduler.stats().num_preemptions > 10
    started = [s for s in runner.finished if s.tenant == "a"]
    most = sum(s.num_tokens - 1 for s in started) + 6 * 14
    assert sum(s.num_tokens - 1 for s in started) <= served["a"] <= most


def test_a_quiet_tenants_request_does_not_wait_for_a_flood():
    runner = FakeRunner(num_blocks=400, limits=Limits(max_batch=6, max_step_tokens=32))
    for i in range(500):
        runner.add(tokens_of(i, 8), max_tokens=6, tenant="flood")
    for _ in range(50):
        runner.step()
    (quiet,) = runner.add(tokens_of(0, 8), max_tokens=6, tenant="quiet")
    before = len(runner.plans)
    while quiet.state != "finished":
        runner.step()
    assert len(runner.plans) - before <= 15


def test_no_tenant_waits_for_ever_on_newcomers():
    """Tenants that come once and never again start where others are, not before everybody."""
    runner = FakeRunner(num_blocks=400, limits=Limits(max_batch=2, max_step_tokens=32))
    regular = []
    for i in range(20):
        regular += runner.add(tokens_of(i, 8), max_tokens=4, tenant="regular")
    for i in range(400):
        runner.add(tokens_of(i, 8), max_tokens=4, tenant=f"newcomer {i}")
        runner.step()
    assert sum(sequence.state == "finished" for sequence in regular) >= 5


def test_prompts_under_way_go_on_in_order_of_service():
    limits = Limits(max_batch=4, max_step_tokens=8, max_chunk=6)
    runner = FakeRunner(num_blocks=40, limits=limits, weights={"gold": 10.0})
    (plain,) = runner.add(tokens_of(0, 24), tenant="plain")
    (gold,) = runner.add(tokens_of(1, 24), tenant="gold")
    runner.step()
    runner.step()
    assert runner.plans == [[(plain, 0, 6), (gold, 0, 2)], [(gold, 2, 6), (plain, 6, 2)]]


def test_idle_times_earn_no_credit_and_clear_no_debt():
    shares = Shares()
    shares.enter("a")
    shares.start("a", 0)
    shares.charge("a", 100, 0)
    shares.settle()
    shares.enter("late")
    assert shares["late"].counter == 100
    shares.start("late", 0)
    shares.charge("late", 50, 0)
    shares.stop("late", 0)
    shares.leave("late")
    shares.settle()
    shares.enter("late")
    assert shares["late"].counter == 150
    shares.enter("new")
    assert shares["new"].counter == 100


def served_once(shares, tenant, tokens):
    """It comes, is served and goes; returns where it started."""
    shares.enter(tenant)
    start = shares[tenant].counter
    shares.start(tenant, 0)
    shares.charge(tenant, tokens, 0)
    shares.settle()
    shares.stop(tenant, 0)
    shares.leave(tenant)
    return start


def test_who_comes_back_is_ahead_by_what_it_did_not_use_up_to_the_head_start():
    shares = Shares({"gold": 2.0}, head_start=30)
    assert [served_once(shares, tenant, 10) for tenant in ("a", "gold")] == [0, 10]
    shares.enter("busy")
    shares.start("busy", 0)
    shares.charge("busy", 5, 0)
    shares.settle()
    assert served_once(shares, "a", 1) == 10, "ten behind: less than the head start"
    shares.charge("busy", 85, 0)
    shares.settle()
    floor = shares["busy"].counter
    assert floor == 105
    assert served_once(shares, "a", 20) == floor - 30
    assert served_once(shares, "a", 20) == floor - 10, "what was used is gone"
    assert served_once(shares, "gold", 1) == floor - 15, "tokens, by weight"
    assert served_once(shares, "new", 1) == floor, "nothing for tenants made on the spot"
    assert served_once(shares, "a", 20) == floor + 10
    assert served_once(shares, "other", 1) == floor + 10, "nobody is owed more than who went last"


@pytest.mark.parametrize("seed", range(5))
def test_coming_and_going_never_gives_more_than_a_share_and_the_head_start(seed):
    """Against one that always waits, over every span of time: a saver gains once what it saved, at most."""
    draw, head_start = random.Random(seed), 24
    runner = FakeRunner(
        num_blocks=400,
        limits=Limits(max_batch=4, max_step_tokens=16, max_chunk=8, head_start=head_start),
        has_cache=False,
    )
    lead, least, most_gained = [], 0, 0
    is_away, own = False, []
    for step in range(1500):
        while (
            sum(s.state == "waiting" and s.tenant == "steady" for s in runner.scheduler._records)
            < 2
        ):
            runner.add(tokens_of(step, 8), max_tokens=4, tenant="steady")
        if draw.random() < 0.02:
            is_away = not is_away
        if not is_away and sum(s.state != "finished" for s in own) < 6:
            own += runner.add(tokens_of(step + 7, 8), max_tokens=4, tenant="saver")
        runner.step()
        served = runner.scheduler.stats().served
        lead.append(served.get("saver", 0) - served.get("steady", 0))
        least = min(least, lead[-1])
        most_gained = max(most_gained, lead[-1] - least)
    # Six prompts and answers of 11 tokens each may be under way on top.
    assert head_start < most_gained <= head_start + 6 * 11


def test_who_waits_keeps_what_it_is_owed_however_many_more_it_sends():
    shares = Shares(head_start=10)
    for tenant in ("waits", "goes"):
        shares.enter(tenant)
    shares.start("goes", 0)
    shares.charge("goes", 100, 0)
    shares.settle()
    shares.enter("waits")
    assert shares["waits"].counter == 0
    shares.start("waits", 0)
    shares.enter("waits")
    assert shares["waits"].counter == 0, "its second one still waited"
    shares.start("waits", 0)
    shares.start("waits", 0)
    shares.enter("waits")
    assert shares["waits"].counter == 90, "nothing of it did"


@pytest.mark.parametrize("who", ["saver", "new"])
def test_a_small_answer_that_never_ends_saves_up_nothing(who):
    """Neither for its tenant, which asks for more one day, nor for one that was never seen before."""
    head_start = 40
    limits = Limits(
        max_batch=12, max_step_tokens=32, max_chunk=16, max_prompt_tokens=16, head_start=head_start
    )
    runner = FakeRunner(num_blocks=800, limits=limits, has_cache=False)

    def step(i, also=None):
        for tenant, count in (("steady", 3), (also, 6)):
            while tenant and sum(s.tenant == tenant for s in runner.scheduler._records) < count:
                runner.add(tokens_of(i, 24), max_tokens=4, tenant=tenant)
        small = [s for s in runner.scheduler._records if s.tenant == "saver"]
        if all(s.num_generated > 30 for s in small) and len(small) < 2:  # before the last one ends
            runner.add(tokens_of(i, 2), max_tokens=40, tenant="saver")
        runner.step()
        return runner.scheduler.stats().served

    for i in range(300):
        before = step(i)
    assert before["steady"] > 10 * before["saver"]
    for i in range(200):
        after = step(i, also=who)
    gained = after[who] - before.get(who, 0)
    lost = after["steady"] - before["steady"]
    # Six prompts and answers of 28 tokens each may be under way on top.
    assert gained - lost <= head_start + 6 * 28, (gained, lost)


def test_a_quiet_tenant_that_comes_back_goes_before_the_prompts_of_a_flood():
    """At equal counters, which is where idle times without a head start end, half of its pieces would wait."""
    waits = {}
    for head_start in (0, 200):
        limits = Limits(max_batch=12, max_step_tokens=16, max_chunk=16, head_start=head_start)
        runner = FakeRunner(num_blocks=800, limits=limits, has_cache=False)
        runner.add(tokens_of(1, 8), max_tokens=1, tenant="quiet")
        runner.run_until_idle()
        waits[head_start] = []
        for i in range(60):
            while sum(s.tenant == "flood" for s in runner.scheduler._records) < 8:
                runner.add(tokens_of(i, 48), max_tokens=4, tenant="flood")
            runner.step()
            if i % 10 == 9:
                (quiet,) = runner.add(tokens_of(i, 96), max_tokens=1, tenant="quiet")
                before = len(runner.plans)
                while not quiet.num_generated:
                    runner.step()
                waits[head_start].append(len(runner.plans) - before)
    assert max(waits[200]) <= 9, "six pieces of 16, less what answers take of each step"
    assert sum(waits[0]) > 1.3 * sum(waits[200]), waits


def test_prompts_under_way_count_before_they_are_served():
    shares = Shares({"a": 2.0})
    shares.enter("a")
    shares.start("a", 10)
    assert (shares["a"].counter, shares["a"].standing) == (0, 5)
    shares.charge("a", 4, 4)
    assert (shares["a"].counter, shares["a"].standing) == (2, 5)
    shares.stop("a", 6)
    assert (shares["a"].counter, shares["a"].standing) == (2, 2)
    shares.check_integrity()


def test_tenants_that_come_and_go_are_forgotten():
    shares = Shares()
    for i in range(40_000):
        tenant = f"tenant {i}"
        shares.enter(tenant)
        shares.start(tenant, 0)
        shares.charge(tenant, 1, 0)
        shares.stop(tenant, 0)
        shares.leave(tenant)
        shares.settle()
    assert len(shares.served()) <= 16_384


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight):
    with pytest.raises(ValueError, match="weight of tenant 'a' must be above 0 and finite"):
        Shares({"a": weight})


def test_a_weight_can_change_while_its_tenant_is_served():
    shares = Shares()
    shares.enter("a")
    shares.start("a", 0)
    shares.charge("a", 10, 0)
    shares.set_weight("a", 10.0)
    shares.charge("a", 10, 0)
    assert shares["a"].counter == 11 and shares["a"].served == 20


def test_a_weight_that_changes_counts_from_then_on():
    runner = FakeRunner(
        num_blocks=400, limits=Limits(max_batch=6, max_step_tokens=32), has_cache=False
    )
    shares = runner.scheduler.shares
    for i in range(900):
        for tenant in ("a", "b"):
            runner.add(tokens_of(i, 8), max_tokens=6, tenant=tenant)
    served = []
    for weight in (1.0, 4.0, 1.0):
        shares.set_weight("a", weight)
        before = runner.scheduler.stats().served
        for _ in range(200):
            runner.step()
        after = runner.scheduler.stats().served
        served.append({tenant: after[tenant] - before.get(tenant, 0) for tenant in "ab"})
    for weight, got in zip((1, 4, 1), served, strict=True):
        assert got["a"] == pytest.approx(weight * got["b"], rel=0.1)


def test_who_weighs_one_again_is_not_remembered():
    shares = Shares()
    for i in range(5000):
        shares.set_weight(f"tenant {i}", 2.0)
        shares.set_weight(f"tenant {i}", 1.0)
    assert not shares._weights


def test_a_newcomer_starts_before_the_prompts_under_way_of_a_flood():
    limits = Limits(max_batch=16, max_step_tokens=32, max_chunk=16)
    runner = FakeRunner(num_blocks=400, limits=limits)
    for i in range(4):
        runner.add(tokens_of(i, 96), tenant="flood")
    for _ in range(3):
        runner.step()
    (quiet,) = runner.add(tokens_of(9, 48), tenant="quiet")
    waited = 0
    while quiet.num_generated == 0:
        runner.step()
        waited += 1
    assert waited == 3, "three pieces of 16, as if it were alone"


def test_newcomers_of_the_flood_itself_do_not_overtake_its_own_prompts():
    limits = Limits(max_batch=16, max_step_tokens=16, max_chunk=16)
    runner = FakeRunner(num_blocks=400, limits=limits)
    (first,) = runner.add(tokens_of(0, 64), tenant="flood")
    runner.step()
    (second,) = runner.add(tokens_of(1, 8), tenant="flood")
    while first.num_generated == 0:
        runner.step()
    assert second.num_generated == 0
