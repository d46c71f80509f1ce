"""Answers that pause for another tenant's first token: when, for how long, and at what cost."""

from __future__ import annotations

import pytest

from engine.crowd import build_engine
from engine.fake_runner import FakeRunner, right_answer, tokens_of
from loramux.engine.admission import Limits
from loramux.engine.fairness import Shares


def crowd(max_pauses, *, rows=3, weights=None, max_tokens=40, **limits):
    """A tenant with `rows` answers under way."""
    given = {"max_batch": 8, "max_step_tokens": 32, "max_chunk": 4, **limits}
    runner = FakeRunner(
        num_blocks=400, limits=Limits(max_pauses=max_pauses, **given), weights=weights,
        has_cache=False,
    )  # fmt: skip
    for i in range(rows):
        runner.add(tokens_of(i, 4), max_tokens=max_tokens, tenant="loud")
    runner.step()
    return runner


def tenants_of(runner, steps):
    """Tokens of each tenant in the last steps."""
    return [
        {
            tenant: sum(count for s, _, count in plan if s.tenant == tenant)
            for tenant in {s.tenant for s, _, _ in plan}
        }
        for plan in runner.plans[-steps:]
    ]


def test_answers_pause_until_the_first_token_of_whom_they_crowd():
    runner = crowd(8)
    (quiet,) = runner.add(tokens_of(9, 12), max_tokens=3, tenant="quiet")
    for _ in range(5):
        runner.step()
    assert tenants_of(runner, 5) == [{"quiet": 4}] * 3 + [{"loud": 3, "quiet": 1}] * 2
    assert quiet.num_generated == 3
    everybody = [*runner.scheduler._running]
    expected = [right_answer(sequence) for sequence in everybody]
    runner.run_until_idle()
    assert [sequence.answer for sequence in everybody] == expected
    runner.check_is_empty()


def test_they_pause_no_longer_than_they_are_told():
    runner = crowd(2)
    runner.add(tokens_of(9, 20), tenant="quiet")
    for _ in range(5):
        runner.step()
    both = {"loud": 3, "quiet": 4}
    assert tenants_of(runner, 5) == [{"quiet": 4}, {"quiet": 4}, both, {"quiet": 4}, {"quiet": 4}]


@pytest.mark.parametrize("max_pauses", [1, 3])
def test_prompts_without_end_slow_answers_down_and_do_not_stop_them(max_pauses):
    runner = crowd(max_pauses, max_tokens=400)
    loud = [s for s in runner.scheduler._running if s.tenant == "loud"]
    for i in range(90):
        runner.add(tokens_of(i, 4), max_tokens=1, tenant=f"quiet {i}")
        runner.step()
    assert {s.num_generated for s in loud} == {1 + 90 // (max_pauses + 1)}


def test_nobody_pauses_unless_told_to():
    runner = crowd(0)
    runner.add(tokens_of(9, 8), tenant="quiet")
    runner.step()
    assert tenants_of(runner, 1) == [{"loud": 3, "quiet": 4}]


def test_who_has_no_more_than_its_share_goes_on():
    alike = crowd(8, rows=1)
    alike.add(tokens_of(9, 8), tenant="quiet")
    alike.step()
    assert tenants_of(alike, 1) == [{"loud": 1, "quiet": 4}]
    heavy = crowd(8, weights={"loud": 2.0})
    heavy.add(tokens_of(9, 8), tenant="quiet")
    heavy.step()
    assert tenants_of(heavy, 1) == [{"loud": 3, "quiet": 4}], (
        "three rows at weight 2: less than twice"
    )
    own = crowd(8)
    own.add(tokens_of(9, 8), tenant="loud")
    own.step()
    assert tenants_of(own, 1) == [{"loud": 7}], "nobody pauses for his own prompt"


def test_a_prompt_that_was_answered_already_lets_nobody_pause():
    """One that preemption makes run again: its reader has the first token."""
    runner = crowd(8)
    (quiet,) = runner.add(tokens_of(9, 8), max_tokens=9, tenant="quiet")
    while not quiet.num_generated:
        runner.step()
    runner.scheduler._preempt(quiet)
    runner.step()
    assert tenants_of(runner, 1) == [{"loud": 3, "quiet": 4}]


def test_the_limit_on_prompts_beside_answers_holds_while_these_pause():
    runner = crowd(8, max_prompt_tokens=4)
    runner.add(tokens_of(9, 8), tenant="quiet")
    runner.add(tokens_of(7, 8), tenant="other")
    runner.step()
    assert [sum(step.values()) for step in tenants_of(runner, 1)] == [4]


@pytest.mark.parametrize("head_start", [0, 200])
def test_prompts_of_a_tenant_that_had_more_than_its_share_let_nobody_pause(head_start):
    """One long prompt after the other, beside two answers of somebody who was served a hundredth of that."""
    runner = crowd(8, rows=2, max_tokens=400, head_start=head_start)
    answers = [*runner.scheduler._running]
    for i in range(300):
        if not any(s.tenant == "reads" for s in runner.scheduler._records):
            runner.add(tokens_of(i, 40), max_tokens=1, tenant="reads")
        runner.step()
    served = runner.scheduler.stats().served
    # The head start and the first prompts, in pieces of 4: what it costs the two, once.
    most_pauses = (head_start + 40) / 4
    assert served["reads"] > 1000 and {s.num_generated >= 301 - most_pauses for s in answers} == {
        True
    }


def test_answers_do_not_pause_after_a_step_that_a_prompt_had_to_itself():
    """Or such prompts and short ones, in turn, would keep them waiting for longer than they are told."""
    runner = crowd(3, max_tokens=400, max_step_tokens=16)
    waits = [0]
    prompts = [
        ("whole 0", 20, True),
        ("short 0", 4, False),
        ("whole 1", 20, True),
        ("short 1", 4, False),
    ]
    for i in range(60):
        for tenant, length, is_routed in prompts:
            if not any(s.tenant == tenant for s in runner.scheduler._records):
                runner.add(tokens_of(i, length), max_tokens=1, tenant=tenant, is_routed=is_routed)
        runner.step()
        if any(s.tenant == "loud" for s, _, _ in runner.plans[-1]):
            waits.append(0)
        else:
            waits[-1] += 1
    assert 3 <= max(waits) <= 4, "three pauses, and a prompt that runs alone"


def test_being_ahead_counts_tokens_by_weight():
    shares = Shares({"gold": 2.0}, head_start=30)
    for tenant in ("gold", "plain"):
        shares.enter(tenant)
    gold, plain = shares["gold"], shares["plain"]
    for tokens, ahead in ((30, False), (1, True)):
        shares.charge("gold", tokens, 0)
        assert shares.is_ahead(gold, plain) is ahead and not shares.is_ahead(plain, gold)
    shares.charge("plain", 31, 0)
    assert not shares.is_ahead(plain, gold), "half a head start, as it weighs half"


def test_an_engine_hands_its_limits_on():
    given = {
        "max_batch": 3, "max_step_tokens": 50, "max_chunk": 7, "max_prompt_tokens": 6, "max_pauses": 2,
        "head_start": 9,
    }  # fmt: skip
    with build_engine(**given) as engine:
        limits = engine.scheduler.limits
        assert {name: getattr(limits, name) for name in given} == given
