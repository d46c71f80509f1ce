"""Random arrivals, samples, aborts, errors and lost steps on tiny pools: right answers, and books that return to zero.

All books are checked after every step (by FakeRunner), and the model made of hashes checks every context that is read.
What is left to do here is to make up trouble.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.fake_runner import FakeRunner, right_answer, tokens_of
from loramux.engine.admission import CROWDED, READY, WAIT, Limits

CONTENTS = ("base", "a", "b", "c")
TENANTS = ("x", "y", "z")


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.expected = {}
        self.may_lack = set()  # aborted or failed: their answer may be cut short, never wrong
        self.loading = set()
        self.leases = {}

    @initialize(
        num_blocks=st.integers(6, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_batch=st.integers(1, 6),
        extra=st.integers(0, 20),
        max_chunk=st.integers(1, 12),
        max_prompt_tokens=st.none() | st.integers(1, 8),
        has_cache=st.booleans(),
        slots=st.integers(1, 3),
        patience=st.integers(0, 4),
        max_pauses=st.integers(0, 3),
        head_start=st.integers(0, 40),
    )
    def build(
        self, num_blocks, block_size, max_batch, extra, max_chunk, max_prompt_tokens, has_cache,
        slots, patience, max_pauses, head_start,
    ):  # fmt: skip
        self.slots = slots
        self.runner = FakeRunner(
            num_blocks=num_blocks,
            block_size=block_size,
            has_cache=has_cache,
            can_admit=self.can_admit,
            limits=Limits(
                max_batch=max_batch,
                max_step_tokens=max_batch + extra,
                max_chunk=max_chunk,
                max_prompt_tokens=max_prompt_tokens,
                patience=patience,
                max_pauses=max_pauses,
                head_start=head_start,
            ),
        )

    def can_admit(self, sequence):
        content = sequence.prefix_seed
        if content == "base" or sequence.lease is not None:
            return READY
        if content in self.loading:
            return WAIT
        live = {s.lease for s in self.leases if s.state != "finished"}
        if content not in live and len(live) >= self.slots:
            return CROWDED
        sequence.lease = content
        self.leases[sequence] = content
        return READY

    @rule(
        seed=st.integers(0, 5),
        length=st.integers(1, 14),
        max_tokens=st.integers(1, 8),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        tenant=st.sampled_from(TENANTS),
        content=st.sampled_from(CONTENTS),
        is_routed=st.sampled_from([False, False, True]),
    )
    def arrive(self, seed, length, max_tokens, n, tenant, content, is_routed):
        room = self.runner.num_blocks * self.runner.block_size
        length = min(length, max(1, room - max_tokens + 1))
        if length + max_tokens - 1 > room:
            return
        samples = self.runner.add(
            tokens_of(seed, length),
            max_tokens=max_tokens,
            n=n,
            tenant=tenant,
            content=content,
            is_routed=is_routed,
        )
        self.expected.update((sample, right_answer(sample)) for sample in samples)

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.runner.step()

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def abort(self, data):
        sequence = data.draw(st.sampled_from(self.running()))
        self.may_lack.update(self.runner.scheduler.abort(sequence.request_id))
        self.runner.scheduler.check_integrity()

    @precondition(lambda self: self.running())
    @rule(data=st.data(), how=st.sampled_from(["abort", "fail", "poison", "abandon"]))
    def spoil_a_step(self, data, how):
        victim = data.draw(st.sampled_from(self.running()))
        plan = self.runner.scheduler.schedule()
        if plan is None:
            return
        if how == "abandon":
            self.runner.scheduler.abandon(plan)
            self.runner.scheduler.check_integrity()
            return
        if how == "abort":
            self.may_lack.update(self.runner.scheduler.abort(victim.request_id))
        elif how == "fail":
            self.may_lack.add(victim)
            self.runner.scheduler.fail(victim, "spoilt")
        else:
            self.may_lack.add(victim)
            self.runner.poisoned.add(victim)
        self.runner.commit(plan)

    @rule(content=st.sampled_from(CONTENTS[1:]))
    def start_to_load(self, content):
        self.loading.add(content)

    @rule()
    def all_loaded(self):
        self.loading.clear()

    def running(self):
        return [sequence for sequence in self.expected if sequence.state != "finished"]

    @invariant()
    def answers_are_right_so_far(self):
        for sequence, expected in self.expected.items():
            assert sequence.answer == expected[: sequence.num_generated]

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        self.loading.clear()
        self.runner.run_until_idle(most=2_000)
        self.runner.check_is_empty()
        assert sorted(map(id, self.runner.finished)) == sorted(map(id, self.expected))
        for sequence, expected in self.expected.items():
            if sequence not in self.may_lack:
                assert sequence.finish_reason == "length" and sequence.answer == expected


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBooks = SchedulerMachine.TestCase
