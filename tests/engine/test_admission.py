"""Who is let in: slots that are loaded, pinned or refused, and who may overtake whom meanwhile."""

from __future__ import annotations

import pytest

from engine.fake_runner import FakeRunner, right_answer, tokens_of
from loramux.engine.admission import CROWDED, READY, WAIT, Limits, refused


def finish_all(runner, sequences):
    runner.run_until_idle()
    assert [sequence.answer for sequence in sequences] == [right_answer(s) for s in sequences]
    runner.check_is_empty()


class SlotTier:
    """Which contents are there, how many slots there are, and who holds one."""

    def __init__(self, slots, loading=()):
        self.slots, self.loading, self.leases, self.asked = slots, set(loading), {}, 0

    def can_admit(self, sequence):
        self.asked += 1
        content = sequence.prefix_seed
        if content in self.loading:
            return WAIT
        if content == "base":
            return READY
        if content == "broken":
            return refused("adapter 'broken' has no rows")
        if sequence.lease is None:
            held = set(self.leases.values())
            if content not in held and len(held) >= self.slots:
                return CROWDED
            sequence.lease = self.leases[sequence] = content
        return READY

    def release(self, sequence):
        self.leases.pop(sequence, None)


def with_slots(tier, **options):
    runner = FakeRunner(num_blocks=64, can_admit=tier.can_admit, **options)
    scheduler = runner.scheduler
    told = scheduler._on_finish

    def on_finish(sequence):
        tier.release(sequence)
        told(sequence)

    scheduler._on_finish = on_finish
    return runner


def test_a_fault_in_the_middle_of_planning_leaves_no_sample_without_its_copies():
    """The second request's question breaks; the forks admitted before it in the same call must start anew."""
    broken = []

    def can_admit(sequence):
        if sequence.prefix_seed == "fault" and not broken:
            broken.append(sequence)
            raise MemoryError
        return READY

    runner = FakeRunner(num_blocks=64, can_admit=can_admit)
    samples = runner.add(tokens_of(0, 6), n=3)
    runner.step()  # the first sample runs the prompt; the others fork it next
    (fault,) = runner.add(tokens_of(1, 5), content="fault")
    with pytest.raises(MemoryError):
        runner.step()
    runner.scheduler.check_integrity()
    finish_all(runner, [*samples, fault])


def test_others_overtake_while_an_adapter_is_loaded():
    tier = SlotTier(slots=2, loading=["slow"])
    runner = with_slots(tier)
    (slow,) = runner.add(tokens_of(0, 5), content="slow")
    (fast,) = runner.add(tokens_of(1, 5), content="fast")
    runner.step()
    assert [chunk[0] for chunk in runner.plans[0]] == [fast]
    tier.loading.clear()
    finish_all(runner, [slow, fast])


def test_nothing_runs_while_everybody_waits_for_adapters():
    runner = with_slots(SlotTier(slots=2, loading=["slow"]))
    runner.add(tokens_of(0, 5), content="slow")
    assert not runner.step()
    assert runner.scheduler.has_work


def test_a_refused_sequence_ends_with_the_reason():
    runner = with_slots(SlotTier(slots=2))
    (bad,), (good,) = (
        runner.add(tokens_of(0, 5), content="broken"),
        runner.add(tokens_of(0, 5), content="good"),
    )
    runner.step()
    assert (bad.finish_reason, bad.error) == ("error", "adapter 'broken' has no rows")
    assert [chunk[0] for chunk in runner.plans[0]] == [good]


def test_one_that_finds_all_slots_pinned_is_not_overtaken_for_ever():
    tier = SlotTier(slots=1)
    limits = Limits(max_batch=4, max_step_tokens=64, patience=5)
    runner = with_slots(tier, limits=limits)
    hot = [runner.add(tokens_of(i, 5), content="hot", tenant="a")[0] for i in range(4)]
    runner.step()
    (cold,) = runner.add(tokens_of(50, 5), content="cold", tenant="a")
    for i in range(60):
        hot += runner.add(tokens_of(i, 5), content="hot", tenant="a")
        runner.step()
        if cold.state != "waiting":
            break
    overtook = sum(s.state != "waiting" for s in hot if s.order > cold.order)
    assert cold.state != "waiting" and overtook <= 8
    finish_all(runner, [*hot, cold])


def test_requests_to_the_base_are_served_while_slots_are_drained():
    tier = SlotTier(slots=1)
    runner = with_slots(tier, limits=Limits(max_batch=4, max_step_tokens=64, patience=0))
    (hot,) = runner.add(tokens_of(0, 5), content="hot", max_tokens=20)
    runner.step()
    (cold,) = runner.add(tokens_of(1, 5), content="cold")
    (warm,) = runner.add(tokens_of(2, 5), content="hot")
    (bare,) = runner.add(tokens_of(3, 5))
    while hot.state == "running":
        assert cold.state == warm.state == "waiting"
        runner.step()
    assert bare.state == "finished"
    finish_all(runner, [hot, cold, warm, bare])


def test_samples_of_one_request_are_asked_about_once():
    tier = SlotTier(slots=1, loading=["slow"])
    runner = with_slots(tier)
    slow = runner.add(tokens_of(0, 5), content="slow", n=100)
    (fast,) = runner.add(tokens_of(1, 5), content="fast")
    runner.step()
    assert tier.asked == 2 and [chunk[0] for chunk in runner.plans[0]] == [fast]
    tier.loading.clear()
    finish_all(runner, [*slow, fast])


def test_slots_are_asked_for_only_while_there_is_room_in_the_batch():
    tier = SlotTier(slots=8)
    runner = with_slots(tier, limits=Limits(max_batch=2, max_step_tokens=64))
    for i in range(2):
        runner.add(tokens_of(i, 5), max_tokens=30)
    runner.step()
    for i in range(100):
        runner.add(tokens_of(i, 5))
    asked = tier.asked
    for _ in range(10):
        runner.step()
    assert tier.asked == asked


def test_a_step_asks_about_a_bounded_number_of_waiting_sequences():
    tier = SlotTier(slots=8, loading=["slow"])
    limits = Limits(max_batch=2, max_step_tokens=64, max_probes=10)
    runner = with_slots(tier, limits=limits)
    for i in range(100):
        runner.add(tokens_of(i, 5), content="slow")
    runner.step()
    assert tier.asked == 10


def test_while_nothing_runs_those_far_behind_are_asked_too():
    """Regression: what many waited for was held by one behind them that no step asked about."""
    tier = SlotTier(slots=8, loading=["slow"])
    runner = with_slots(tier, limits=Limits(max_batch=2, max_step_tokens=64, max_probes=10))
    for i in range(100):
        runner.add(tokens_of(i, 5), content="slow")
    (behind,) = runner.add(tokens_of(0, 5), content="fast")
    for _ in range(16):
        runner.step()
    assert behind.state == "finished" or behind.state == "running"
    assert tier.asked < 500, "a look at all who wait is the exception: idle steps are many"


def test_slots_are_not_drained_for_one_that_waits_for_its_adapter_again():
    """Regression: it was crowded out before, so nobody was let in, not even the one it had to wait behind."""
    tier = SlotTier(slots=1)
    runner = with_slots(tier, limits=Limits(max_batch=4, max_step_tokens=64, patience=0))
    (hot,) = runner.add(tokens_of(0, 5), content="hot", max_tokens=3)
    runner.step()
    (cold,) = runner.add(tokens_of(1, 5), content="cold")
    runner.step()
    tier.loading.add("cold")  # it lost its memory to an older one
    (warm,) = runner.add(tokens_of(2, 5), content="warm")
    for _ in range(9):
        runner.step()
    assert hot.state == warm.state == "finished"
    assert cold.state == "waiting"
    tier.loading.clear()
    finish_all(runner, [hot, warm, cold])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_chunk": 0}, "max_chunk must be at least 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"max_batch": 9, "max_step_tokens": 8}, "below max_batch .9.*raise it or lower max_batch"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Limits(**options)
