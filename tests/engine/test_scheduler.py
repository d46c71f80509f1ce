"""The scheduler over a model made of hashes (fake_runner.py): whoever is preempted or forked answers as if alone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.fake_runner import FakeRunner, right_answer, routes_of, tokens_of
from loramux.engine.admission import READY, WAIT, Limits
from loramux.engine.scheduler import UnservableError


def run_all(runner, sequences):
    expected = [right_answer(sequence) for sequence in sequences]
    runner.run_until_idle()
    assert [sequence.answer for sequence in sequences] == expected
    assert {sequence.finish_reason for sequence in sequences} == {"length"}
    assert sorted(map(id, runner.finished)) == sorted(map(id, sequences)), "told of each end once"
    runner.check_is_empty()


# -- what a step holds -------------------------------------------------------------------------------------------------


def test_a_prompt_runs_in_pieces_and_then_token_by_token():
    runner = FakeRunner(limits=Limits(max_batch=4, max_step_tokens=16, max_chunk=5))
    (sequence,) = runner.add(tokens_of(0, 12), max_tokens=3)
    run_all(runner, [sequence])
    assert [[chunk[1:] for chunk in plan] for plan in runner.plans] == [
        [(0, 5)], [(5, 5)], [(10, 2)], [(12, 1)], [(13, 1)],
    ]  # fmt: skip


def test_decodes_come_first_and_prompts_fill_the_rest_of_a_step():
    runner = FakeRunner(limits=Limits(max_batch=4, max_step_tokens=8, max_chunk=8))
    (first,) = runner.add(tokens_of(0, 4), max_tokens=8)
    runner.step()
    (second,) = runner.add(tokens_of(1, 12), max_tokens=2)
    runner.step()
    assert runner.plans[-1] == [(first, 4, 1), (second, 0, 7)]
    run_all(runner, [first, second])


def test_prompts_leave_decodes_their_share_of_a_step_if_told_to():
    limits = Limits(max_batch=4, max_step_tokens=32, max_chunk=32, max_prompt_tokens=3)
    runner = FakeRunner(limits=limits)
    (first,) = runner.add(tokens_of(0, 10), max_tokens=8)
    runner.step()
    (second,) = runner.add(tokens_of(1, 9), max_tokens=2)
    runner.step()
    assert runner.plans[0] == [(first, 0, 10)], "nobody decodes yet"
    assert runner.plans[1] == [(first, 10, 1), (second, 0, 3)]
    run_all(runner, [first, second])


def test_no_more_sequences_run_at_once_than_the_batch_holds():
    runner = FakeRunner(num_blocks=64, limits=Limits(max_batch=3, max_step_tokens=64))
    sequences = [runner.add(tokens_of(i, 4))[0] for i in range(10)]
    run_all(runner, sequences)
    assert max(map(len, runner.plans)) == 3


def test_a_prompt_that_decides_its_routes_is_never_cut():
    runner = FakeRunner(limits=Limits(max_batch=4, max_step_tokens=16, max_chunk=4))
    (first,) = runner.add(tokens_of(0, 6), max_tokens=6)
    runner.step()
    (routed,) = runner.add(tokens_of(1, 14), is_routed=True)
    run_all(runner, [first, routed])
    assert (routed, 0, 14) in [chunk for plan in runner.plans for chunk in plan]


def test_a_prompt_in_one_piece_that_exceeds_the_step_runs_alone():
    runner = FakeRunner(limits=Limits(max_batch=4, max_step_tokens=8, max_chunk=4))
    (first,) = runner.add(tokens_of(0, 3), max_tokens=6)
    runner.step()
    (routed,) = runner.add(tokens_of(1, 20), is_routed=True)
    run_all(runner, [first, routed])
    assert [(routed, 0, 20)] in runner.plans


def test_prompts_that_run_alone_do_not_stop_those_that_decode():
    runner = FakeRunner(num_blocks=64, limits=Limits(max_batch=8, max_step_tokens=8, max_chunk=4))
    (first,) = runner.add(tokens_of(0, 3), max_tokens=6)
    runner.step()
    routed = [runner.add(tokens_of(i, 20), is_routed=True)[0] for i in range(1, 8)]
    run_all(runner, [first, *routed])
    alone = [len(plan) == 1 and plan[0][2] == 20 for plan in runner.plans]
    assert not any(a and b for a, b in pairwise(alone))


def test_a_prompt_in_one_piece_is_not_kept_out_by_pieces_of_others_for_ever():
    runner = FakeRunner(num_blocks=64, limits=Limits(max_batch=8, max_step_tokens=16, max_chunk=8))
    sequences = [runner.add(tokens_of(0, 24), max_tokens=1)[0]]
    runner.step()
    (routed,) = runner.add(tokens_of(1, 16), is_routed=True, max_tokens=1)
    sequences.append(routed)
    for i in range(20):
        sequences += runner.add(tokens_of(2 + i, 24), max_tokens=1)
        runner.step()
        if routed.state == "finished":
            break
    assert routed.state == "finished" and len(runner.plans) < 6
    run_all(runner, sequences)


def test_single_tokens_behind_a_context_come_before_pieces_of_prompts():
    runner = FakeRunner(num_blocks=64)
    samples = runner.add(tokens_of(0, 9), n=4)
    runner.step()
    other = runner.add(tokens_of(1, 9))
    runner.step()
    assert [chunk[2] for chunk in runner.plans[-1]] == [1, 1, 1, 1, 9]
    run_all(runner, samples + other)


# -- prefixes ----------------------------------------------------------------------------------------------------------


def test_a_second_prompt_with_the_same_beginning_runs_only_what_is_new():
    runner = FakeRunner(num_blocks=32)
    beginning = tokens_of(0, 16)
    (first,) = runner.add([*beginning, 1, 2])
    runner.step()
    (second,) = runner.add([*beginning, 2, 1])
    runner.step()
    assert (second, 16, 2) in runner.plans[-1]
    assert (first.num_cached, second.num_cached) == (0, 16)
    run_all(runner, [first, second])
    (third,) = runner.add([*beginning, 0])
    runner.step()
    assert third.num_cached == 16, "blocks of finished sequences are found too"


def test_the_last_token_of_a_prompt_always_runs():
    runner = FakeRunner(num_blocks=32)
    prompt = tokens_of(0, 16)
    runner.add(prompt)
    runner.run_until_idle()
    (again,) = runner.add(prompt)
    runner.step()
    assert again.num_cached == 12 and runner.plans[-1] == [(again, 12, 4)]


@pytest.mark.parametrize(
    "reason", ["another content", "no cache", "routed by its prompt", "no key"]
)
def test_nothing_is_found_under(reason):
    runner = FakeRunner(num_blocks=32, has_cache=reason != "no cache")
    content = "" if reason == "no key" else "a"
    is_routed = reason == "routed by its prompt"
    prompt = tokens_of(0, 17)
    first = runner.add(prompt, content=content, is_routed=is_routed)
    runner.run_until_idle()
    content = "b" if reason == "another content" else content
    second = runner.add(prompt, content=content, is_routed=is_routed)
    runner.step()
    assert second[0].num_cached == 0 and runner.plans[-1] == [(second[0], 0, 17)]
    run_all(runner, first + second)


def test_an_answer_that_is_continued_finds_its_own_blocks():
    runner = FakeRunner(num_blocks=32)
    (first,) = runner.add(tokens_of(0, 10), max_tokens=8)
    runner.run_until_idle()
    (second,) = runner.add([*first.tokens, 1])
    runner.step()
    assert second.num_cached == 16, "of 17 computed tokens, 16 fill blocks"


def test_a_sequence_that_starts_over_is_found_again_though_its_first_blocks_are_gone():
    runner = FakeRunner(num_blocks=32)
    runner.add([*tokens_of(0, 16), 1])
    runner.step()
    runner.scheduler.abandon(runner.scheduler.schedule())
    runner.pool.clear_cache()
    runner.run_until_idle()
    (second,) = runner.add([*tokens_of(0, 16), 2])
    runner.step()
    assert second.num_cached == 16


# -- samples of one request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 8, 9, 11])
@pytest.mark.parametrize("is_routed", [False, True])
def test_samples_run_their_prompt_once(length, is_routed):
    runner = FakeRunner(num_blocks=32)
    samples = runner.add(tokens_of(0, length), n=4, is_routed=is_routed)
    runner.step()
    assert runner.plans == [[(samples[0], 0, length)]]
    runner.step()
    assert {count for _, _, count in runner.plans[1]} == {1}
    assert len(runner.plans[1]) == 4
    if is_routed:
        assert {sample.routes for sample in samples} == {routes_of(tokens_of(0, length))}
    run_all(runner, samples)


def test_samples_share_the_full_blocks_of_their_prompt():
    runner = FakeRunner(num_blocks=32, has_cache=False)
    samples = runner.add(tokens_of(0, 10), n=3)
    runner.step()
    runner.step()
    tables = [sample.blocks for sample in samples]
    assert {tuple(table[:2]) for table in tables} == {tuple(tables[0][:2])}
    assert len({table[2] for table in tables}) == 3
    run_all(runner, samples)


def test_samples_that_come_late_start_from_what_is_left():
    """One at a time: each starts when the one before is gone, with its routes but without its blocks."""
    runner = FakeRunner(limits=Limits(max_batch=1, max_step_tokens=8, max_chunk=4))
    samples = runner.add(tokens_of(0, 10), n=3, is_routed=True)
    run_all(runner, samples)
    whole = [chunk for plan in runner.plans for chunk in plan if chunk[2] == 10]
    assert whole == [(samples[0], 0, 10)], "routes are there already, so later ones run in pieces"


def test_aborting_the_first_sample_lets_another_one_run_the_prompt():
    runner = FakeRunner(limits=Limits(max_batch=4, max_step_tokens=8, max_chunk=4))
    samples = runner.add(tokens_of(0, 10), n=3)
    runner.step()
    runner.scheduler.finish(samples[0], "abort")
    runner.run_until_idle()
    assert [sample.answer for sample in samples[1:]] == [right_answer(s) for s in samples[1:]]
    runner.check_is_empty()


# -- room --------------------------------------------------------------------------------------------------------------


def test_preempted_sequences_lose_no_token_and_answer_the_same():
    runner = FakeRunner(num_blocks=6, has_cache=False)
    sequences = [runner.add(tokens_of(i, 6), max_tokens=12)[0] for i in range(3)]
    run_all(runner, sequences)
    assert sum(sequence.preemptions for sequence in sequences) > 0


def test_a_preempted_prompt_routed_sequence_keeps_its_routes_and_may_then_be_cut():
    limits = Limits(max_batch=4, max_step_tokens=16, max_chunk=4)
    runner = FakeRunner(num_blocks=7, has_cache=False, limits=limits)
    sequences = [runner.add(tokens_of(i, 8), max_tokens=12, is_routed=True)[0] for i in range(2)]
    run_all(runner, sequences)
    (victim,) = [sequence for sequence in sequences if sequence.preemptions]
    starts = [chunk[1:] for plan in runner.plans for chunk in plan if chunk[0] is victim]
    assert starts.count((0, 8)) == 1 and (0, 4) in starts


def test_the_most_served_tenants_newest_sequence_makes_room():
    runner = FakeRunner(num_blocks=9, has_cache=False)
    (old,) = runner.add(tokens_of(0, 8), max_tokens=20, tenant="much")
    (new,) = runner.add(tokens_of(1, 8), max_tokens=20, tenant="much")
    (other,) = runner.add(tokens_of(2, 8), max_tokens=20, tenant="little")
    while not (old.preemptions or new.preemptions or other.preemptions):
        runner.step()
    assert (old.preemptions, new.preemptions, other.preemptions) == (0, 1, 0)
    run_all(runner, [old, new, other])


@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_a_sequence_may_make_room_after_it_was_planned(length):
    """The newer one was admitted first, so it is planned first; then the older one needs a block."""
    runner = FakeRunner(num_blocks=6, has_cache=False)
    (older,) = runner.add(tokens_of(0, length), max_tokens=12)
    (newer,) = runner.add(tokens_of(1, 8), max_tokens=12)
    runner.scheduler._can_admit = lambda sequence: WAIT if sequence is older else READY
    runner.step()
    runner.scheduler._can_admit = lambda sequence: READY
    run_all(runner, [older, newer])
    assert (older.preemptions, newer.preemptions) == (0, 1)


def test_a_sequence_that_waits_for_blocks_is_not_overtaken_by_smaller_ones():
    runner = FakeRunner(num_blocks=8, has_cache=False)
    first = [runner.add(tokens_of(i, 8), max_tokens=4)[0] for i in range(3)]
    runner.step()
    (large,) = runner.add(tokens_of(5, 24), max_tokens=4)
    small = []
    for i in range(30):
        small += runner.add(tokens_of(10 + i, 2), max_tokens=4)
        assert all(sequence.state == "waiting" for sequence in small)
        runner.step()
        if large.state != "waiting":
            break
    assert large.state == "running"
    run_all(runner, [*first, large, *small])


def test_what_can_never_fit_is_refused_at_once():
    runner = FakeRunner(num_blocks=4, block_size=4)
    with pytest.raises(UnservableError, match="may grow to 17 tokens .* holds 16"):
        runner.add(tokens_of(0, 10), max_tokens=8)
    with pytest.raises(UnservableError, match="empty prompt"):
        runner.add([], max_tokens=8)
    assert not runner.scheduler.has_work
    exact = runner.add(tokens_of(0, 10), max_tokens=7) + runner.add(tokens_of(1, 16), max_tokens=1)
    run_all(runner, exact)


def test_the_last_blocks_are_left_to_those_that_run():
    limits = Limits(max_batch=8, max_step_tokens=1024, max_chunk=1024)
    runner = FakeRunner(num_blocks=200, limits=limits, has_cache=False)
    (first,) = runner.add(tokens_of(0, 4), max_tokens=6)
    runner.step()
    (second,) = runner.add(tokens_of(1, 197 * 4), max_tokens=2)
    runner.step()
    assert (first.state, second.state) == ("running", "waiting"), "it would leave less than 1 %"
    run_all(runner, [first, second])


def test_nothing_to_do_gives_no_plan():
    assert FakeRunner().scheduler.schedule() is None


# -- ends --------------------------------------------------------------------------------------------------------------


def test_abort_frees_the_blocks_of_all_samples_at_once():
    runner = FakeRunner(num_blocks=32)
    samples = runner.add(tokens_of(0, 9), n=3)
    runner.step()
    runner.step()
    assert runner.scheduler.abort(samples[0].request_id) == samples
    assert {sample.finish_reason for sample in samples} == {"abort"}
    runner.check_is_empty()
    assert runner.scheduler.abort(samples[0].request_id) == []


def test_a_sequence_may_end_between_plan_and_commit():
    runner = FakeRunner()
    (first,), (second,) = runner.add(tokens_of(0, 5)), runner.add(tokens_of(1, 5))
    plan = runner.scheduler.schedule()
    runner.scheduler.abort(first.request_id)
    runner.commit(plan)
    assert first.answer == [] and second.num_generated == 1
    runner.run_until_idle()
    runner.check_is_empty()


def test_a_row_that_is_not_finite_ends_alone_and_leaves_nothing_in_the_cache():
    limits = Limits(max_batch=4, max_step_tokens=16, max_chunk=8)
    runner = FakeRunner(num_blocks=32, limits=limits)
    (bad,) = runner.add(tokens_of(0, 20))
    (good,) = runner.add(tokens_of(1, 5), content="other")
    runner.poisoned.add(bad)
    runner.run_until_idle()
    assert bad.finish_reason == "error" and "not finite" in bad.error and bad.answer == []
    assert good.answer == right_answer(good)
    (again,) = runner.add(tokens_of(0, 20))
    runner.step()
    assert again.num_cached == 0
    runner.run_until_idle()
    runner.check_is_empty()


def test_fail_before_commit_states_the_callers_reason():
    runner = FakeRunner()
    (sequence,) = runner.add(tokens_of(0, 9))
    plan = runner.scheduler.schedule()
    runner.scheduler.fail(sequence, "NaN in row 0")
    runner.scheduler.commit(plan, {})
    assert (sequence.finish_reason, sequence.error) == ("error", "NaN in row 0")
    assert runner.pool.num_cached == 0
    runner.check_is_empty()


def test_an_abandoned_step_starts_over_from_the_tokens_there_are():
    runner = FakeRunner(num_blocks=32)
    samples = runner.add(tokens_of(0, 9), n=3)
    runner.step()
    plan = runner.scheduler.schedule()
    assert len(plan.chunks) == 3 and plan.copies == ()
    runner.scheduler.abandon(plan)
    runner.scheduler.check_integrity()
    assert samples[0].num_generated == 1 and samples[0].blocks == []
    run_all(runner, samples)
