"""Decides what each step runs: which sequences are admitted, which pieces of prompts, who makes room for whom.

Why: one forward serves everybody, so somebody must see to it that it stays full, that no tenant starves another, that a
prompt whose routing looks at all of it runs in one piece, and that every block is given back.

The runner's side: add(sequence) once per sample; then plan = schedule(), run the forward, commit(plan, tokens), and
finish(sequence, reason) for those that are done; abort(request_id) and fail(sequence, error) between any two of these.

Why nothing livelocks: a sequence gets the blocks of all its tokens when it is admitted, so only decodes ask for more;
whoever decodes has sampled a token since it was admitted last; and add() refuses what would not fit on its own. So
every round of preemptions is paid for with tokens, and these are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loramux.engine.admission import READY, Admission, Limits
from loramux.engine.blocks import BlockPool
from loramux.engine.draft import Draft
from loramux.engine.fairness import Shares
from loramux.engine.request import NO_TOKEN, FinishReason
from loramux.engine.sequence import Chunk, Sequence, StepPlan
from loramux.engine.tables import Tables
from loramux.engine.waiting import WaitingQueues
from loramux.engine.yielding import pause_answers
from loramux.errors import LoramuxError

CanAdmit = Callable[[Sequence], Admission]
Outcome = Literal["admitted", "wait", "crowded", "refused", "no room"]


class UnservableError(LoramuxError):
    """A request that this engine could never finish."""


@dataclass(eq=False)
class _Record:
    """What the scheduler knows of an unfinished sequence.

    num_charged: tokens its tenant has paid for; those that preemption makes run again are not paid for twice.
    pending: see Share. crowded_at: admissions when it was first crowded out.
    """

    num_charged: int = 0
    pending: int = 0
    crowded_at: int | None = None


@dataclass(frozen=True)
class SchedulerStats:
    """num_found_tokens: found in the prefix cache, by preempted sequences too. served: tokens of each tenant."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_admissions: int
    num_found_tokens: int
    served: dict[str, int]


class Scheduler:
    """See the top of this file. One plan is under way at a time; not thread-safe: one thread calls.

    can_admit(sequence) is asked, in order of fairness, about waiting sequences whenever there is room in the batch.
    READY means that the sequence holds its lease; it may be asked again (no blocks yet, or preempted) and then
    answers READY. on_finish(sequence) is called once for every sequence added, when its blocks are back: the place to
    release its lease.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits | None = None,
        can_admit: CanAdmit = lambda sequence: READY,
        *,
        weights: Mapping[str, float] | None = None,
        on_finish: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.pool = pool
        self.limits = limits or Limits()
        self.shares = Shares(weights, self.limits.head_start)
        self._can_admit = can_admit
        self._on_finish = on_finish
        self._tables = Tables(pool)
        self._waiting = WaitingQueues()
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._records: dict[Sequence, _Record] = {}
        self._samples: dict[str, list[Sequence]] = {}  # unfinished ones of each request
        self._plan: StepPlan | None = None
        self._was_alone = False
        self._num_preemptions = 0
        self._num_admissions = 0
        self._num_idle = 0  # steps that began with nothing running

    # -- what comes and goes ------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Samples of one request are added one after the other, the first one first."""
        assert sequence.state == "waiting" and sequence not in self._records, "added twice"
        if sequence.num_prompt < 1:
            raise UnservableError(
                f"request {sequence.request_id!r} has an empty prompt; it needs at least one token"
            )
        # The last token of an answer is never run, so it needs no room.
        most = sequence.num_prompt + sequence.request.params.max_tokens - 1
        room = self.pool.num_blocks * self.pool.block_size
        if most > room:
            raise UnservableError(
                f"request {sequence.request_id!r} may grow to {most} tokens ({sequence.num_prompt} of "
                f"prompt, max_tokens {sequence.request.params.max_tokens}), but the KV pool holds {room}; "
                f"shorten it, lower max_tokens, or give the pool more memory"
            )
        self._records[sequence] = _Record()
        self._samples.setdefault(sequence.request_id, []).append(sequence)
        self.shares.enter(sequence.tenant)
        self._waiting.add(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Take a sequence out, whatever it is doing; its blocks are free at once. A finished one is left as it is."""
        if sequence.state == "finished":
            return
        if sequence.state == "running":
            self._stop(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state, sequence.finish_reason, sequence.error = "finished", reason, error
        del self._records[sequence]
        self._tables.forget(sequence)
        samples = self._samples[sequence.request_id]
        samples.remove(sequence)
        if not samples:
            del self._samples[sequence.request_id]
        self.shares.leave(sequence.tenant)
        self._on_finish(sequence)

    def fail(self, sequence: Sequence, error: str) -> None:
        """End one sequence with an error. Before commit(), nothing of the step that failed enters the prefix cache."""
        self.finish(sequence, "error", error)

    def abort(self, request_id: str) -> list[Sequence]:
        """End all unfinished samples of a request and return them; none if it is unknown or finished."""
        samples = list(self._samples.get(request_id, ()))
        for sequence in samples:
            self.finish(sequence, "abort")
        return samples

    @property
    def has_work(self) -> bool:
        return bool(self._records)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_preemptions=self._num_preemptions,
            num_admissions=self._num_admissions,
            num_found_tokens=self._tables.num_found,
            served=self.shares.served(),
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run now. Must be answered with commit() or abandon()."""
        assert self._plan is None, "the last plan was neither committed nor abandoned"
        draft = Draft(self.limits, was_alone=self._was_alone)
        before = set(self._running)
        try:
            self._plan_decodes(draft)
            self._plan_prompts(draft)
            self._admit_waiting(draft)
            pause_answers(draft, self.shares, self.limits.max_pauses)
        except BaseException:
            # Copies that newcomers need before their first step go with the draft, so they must be admitted anew.
            for sequence in [s for s in self._running if s not in before]:
                self._preempt(sequence)
            raise
        self._was_alone = draft.is_alone
        self._plan = draft.plan()
        return self._plan

    def commit(self, plan: StepPlan, tokens: Mapping[Sequence, int | None]) -> None:
        """The plan has run. tokens: what each sequence with a sampling chunk drew; None ends it with an error.

        The runner has set `routes` of those whose prompt decides them. Sequences that ended meanwhile need no token.
        """
        assert plan is self._plan, "commit() takes the plan that schedule() gave out last"
        self._plan = None
        for chunk in plan.chunks:
            if chunk.sequence.state == "running":
                self._commit_chunk(chunk, tokens)
        self.shares.settle()

    def is_planned(self, plan: StepPlan) -> bool:
        """Whether the plan still waits for its answer."""
        return plan is self._plan

    def abandon(self, plan: StepPlan) -> None:
        """The plan did not run to its end: its sequences wait again and start over, with the tokens they have."""
        assert plan is self._plan, "abandon() takes the plan that schedule() gave out last"
        self._plan = None
        for chunk in plan.chunks:
            if chunk.sequence.state == "running":
                self._preempt(chunk.sequence)

    def _commit_chunk(self, chunk: Chunk, tokens: Mapping[Sequence, int | None]) -> None:
        sequence = chunk.sequence
        samples = chunk.samples
        self._charge(sequence, chunk)
        sequence.num_computed = chunk.start + chunk.count
        if not samples:
            return
        token = tokens[sequence]
        if token is None:
            self.fail(sequence, sequence.error or NO_TOKEN)
            return
        # Only now: a prompt whose first pieces are not finite is noticed at its first sample at the latest.
        self._tables.list_full(sequence)
        sequence.tokens.append(token)
        if sequence.routes is not None and sequence.num_generated == 1:
            for sample in self._samples[sequence.request_id]:
                if sample.routes is None:
                    sample.routes = sequence.routes

    def _charge(self, sequence: Sequence, chunk: Chunk) -> None:
        record = self._records[sequence]
        end = chunk.start + chunk.count
        fresh = max(0, end - max(chunk.start, record.num_charged))
        announced = min(record.pending, fresh)
        record.num_charged = max(record.num_charged, end)
        record.pending -= announced
        self.shares.charge(sequence.tenant, fresh, announced)

    # -- what is running already --------------------------------------------------------------------------------------

    def _plan_decodes(self, draft: Draft) -> None:
        for sequence in list(self._running):
            if sequence.state != "running" or sequence.num_tokens - sequence.num_computed != 1:
                continue
            if self._grow(sequence, draft):
                draft.add_decode(sequence)

    def _grow(self, sequence: Sequence, draft: Draft) -> bool:
        """Give it the block its next token needs; False if it was itself the one to make room."""
        missing = self._tables.missing(sequence)
        while missing > self.pool.num_free:
            victim = max(self._running, key=self._dispensability)
            self._preempt(victim)
            draft.drop_decode(victim)
            if victim is sequence:
                return False
        if missing > 0:
            self._tables.grow(sequence, missing)
        return True

    def _dispensability(self, sequence: Sequence) -> tuple[float, int]:
        """The most served tenant's newest sequence makes room first."""
        return self.shares[sequence.tenant].standing, sequence.order

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue. Tokens, routes and lease stay; keys and values are computed again."""
        self._stop(sequence)
        sequence.state = "waiting"
        sequence.num_computed = 0
        sequence.preemptions += 1
        self._num_preemptions += 1
        self._waiting.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        record = self._records[sequence]
        self.shares.stop(sequence.tenant, record.pending)
        record.pending = 0
        del self._running[sequence]
        self._tables.stop(sequence)

    def _plan_prompts(self, draft: Draft) -> None:
        """Go on with prompts under way, the least served tenant's first; who was served less than it may start before.

        Otherwise a tenant with many long prompts under way would leave newcomers no room in the step.
        """
        under_way = [s for s in self._running if s.num_tokens - s.num_computed > 1]
        for sequence in sorted(under_way, key=self._dispensability):
            if draft.room():
                self._admit_waiting(draft, before=sequence)
            draft.add_piece(sequence)

    # -- what is new --------------------------------------------------------------------------------------------------

    def _admit_waiting(self, draft: Draft, before: Sequence | None = None) -> None:
        """Start waiting sequences in order of fairness while there is room in the batch, the step and the pool.

        before: only those whose tenants were served less than the one of this prompt under way.

        Those that wait for an adapter are overtaken; one that waits for blocks is not, or small ones would keep large
        ones out for ever. For one that slots were denied to for too long, nobody else gets any: only those who hold
        their lease already, and requests to the base, go on.
        """
        probes = self.limits.max_probes
        if not self._running:  # what those in front wait for may be held by one far behind
            self._num_idle += 1  # every 2nd time twice as far, every 4th four times, and so on
            probes *= self._num_idle & -self._num_idle
        held: set[str] = set()  # requests whose other samples need not be asked about either
        is_draining = False
        most = math.inf if before is None else self.shares[before.tenant].standing
        for sequence in self._waiting.in_turn(self.shares):
            if self.shares[sequence.tenant].standing >= most:
                return
            if sequence.request_id in held:
                continue
            if not probes or not draft.budget or len(self._running) >= self.limits.max_batch:
                return
            probes -= 1
            if is_draining and sequence.request.mix and sequence.lease is None:
                continue
            outcome = self._admit(sequence, draft, may_be_alone=before is None)
            if outcome == "no room":
                return
            if outcome in ("wait", "crowded"):
                held.add(sequence.request_id)
            if outcome == "crowded":  # not "wait": that can be for one that draining would keep out
                is_draining = is_draining or self._is_crowded_out(sequence)

    def _admit(self, sequence: Sequence, draft: Draft, may_be_alone: bool) -> Outcome:
        samples = self._samples[sequence.request_id]
        running = [sample for sample in samples if sample.state == "running"]
        source = next((sample for sample in running if _has_prompt(sample)), None)
        if running and source is None:
            return "wait"  # soon their prompt is there to be shared
        admission = self._can_admit(sequence)
        record = self._records[sequence]
        if admission.kind == "refused":
            self.fail(sequence, admission.reason)
            return "refused"
        if admission.kind == "crowded" and record.crowded_at is None:
            record.crowded_at = self._num_admissions
        if admission.kind != "ready":
            return admission.kind
        record.crowded_at = None
        is_whole = not sequence.is_chunkable and sequence.routes is None
        # What exceeds a step runs alone, which prompts under way must not wait for.
        if is_whole and not may_be_alone and not draft.fits(sequence.num_tokens):
            return "no room"
        return self._start(sequence, draft, None if is_whole else source, is_whole)

    def _is_crowded_out(self, sequence: Sequence) -> bool:
        since = self._records[sequence].crowded_at
        return since is not None and self._num_admissions - since >= self.limits.patience

    def _start(
        self, sequence: Sequence, draft: Draft, source: Sequence | None, is_whole: bool
    ) -> Outcome:
        if not (draft.takes_whole(sequence.num_tokens) if is_whole else draft.room()):
            return "no room"
        # A little room to grow keeps the newest from being preempted at once; the first one needs none.
        spare = self.pool.num_blocks // 100 if self._running else 0
        copies = self._tables.start(sequence, source=source, finds=not is_whole, spare=spare)
        if copies is None:
            return "no room"
        draft.copies += copies
        self._waiting.remove(sequence)
        self._running[sequence] = None
        sequence.state = "running"
        self._num_admissions += 1
        if not sequence.preemptions and source is None:
            sequence.num_cached = sequence.num_computed
        record = self._records[sequence]
        done = max(sequence.num_computed, record.num_charged)
        record.pending = max(0, sequence.num_tokens - done)
        self.shares.start(sequence.tenant, record.pending)
        if is_whole:
            draft.add_whole(sequence)
        else:
            draft.add_piece(sequence)
        return "admitted"

    # -- proof --------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """All books agree: blocks, tables, queues, tenants. For tests after every step, and for an idle engine."""
        waiting = list(self._waiting)
        assert len(waiting) + len(self._running) == len(self._records), (
            "a sequence is lost or doubled"
        )
        assert {*waiting, *self._running} == self._records.keys()
        samples = [sequence for samples in self._samples.values() for sequence in samples]
        assert len(samples) == len(self._records) and {*samples} == self._records.keys()
        for sequence in waiting:
            assert sequence.state == "waiting" and not sequence.blocks and not sequence.num_computed
        for sequence in self._running:
            assert sequence.state == "running" and sequence.num_computed < sequence.num_tokens
        self._tables.check_integrity(self._running, self._records)
        self.shares.check_integrity()


def _has_prompt(sequence: Sequence) -> bool:
    return sequence.num_computed >= sequence.num_prompt
