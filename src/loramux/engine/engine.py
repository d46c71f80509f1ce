"""`Engine`: requests in, tokens out; one base model, many tenants' adapters, one batch.

A step: the scheduler chooses whose tokens run, the runner runs them in one forward, each sequence draws its next
token, and what is finished gives back its blocks and its pins. One thread calls; aio.AsyncEngine is the front for
servers.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import time
from collections.abc import Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

from loramux.engine.admission import CROWDED, READY, WAIT, Admission, Limits, refused
from loramux.engine.answers import Answers
from loramux.engine.blocks import BlockPool
from loramux.engine.keys import PrefixKey
from loramux.engine.leases import Lease
from loramux.engine.mixes import check_mix, why_no_mix, why_no_task
from loramux.engine.outputs import Output
from loramux.engine.parts import Parts, build_parts
from loramux.engine.request import (
    Answered,
    Completion,
    Delta,
    Request,
)
from loramux.engine.sampling import Sampled, sample
from loramux.engine.scheduler import Scheduler
from loramux.engine.sequence import Sequence, StepPlan

log = logging.getLogger(__name__)
IDLE_S = 0.001  # while nothing can run because adapters are being read


class Engine(Answers):
    """Serves one base model.

    base: a folder, a hub id, a name that `loramux fetch` knows, or a transformers model (then with its tokenizer, or
    with token ids as prompts only). The model is used as it is, in eval mode, and given back unchanged by `close`.
    kv_memory, adapter_memory, slot_memory: budgets in bytes or as "512MiB", for keys and values, for adapters in
    memory and for those in slots. max_slots: how many experts can be in slots at once (an adapter takes one slot per
    expert). max_batch: sequences per step; max_step_tokens: tokens per step; max_chunk: tokens of one prompt per step.
    max_prompt_tokens: prompt tokens of all requests in a step in which others decode, None for no limit of its own;
    it bounds the wait between two tokens of an answer. max_pauses: steps in a row in which the answers of a tenant who
    crowds another pause for that one's first token (yielding.py). head_start: tokens by which a tenant who used less
    than its share may be served before others (fairness.py). tenant_weights: shares of tenants that are not 1.
    fuse: run norms and rotary embeddings as one call each where a probe shows the same numbers. cuda_graphs: capture
    decode steps on a GPU; on a CPU it changes nothing. Raises ValueError with what does not fit.
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any = None,
        *,
        dtype: str | None = None,
        kv_memory: int | str = "512MiB",
        adapter_memory: int | str = "2GiB",
        slot_memory: int | str = "1GiB",
        max_slots: int = 1024,
        max_batch: int = 64,
        max_step_tokens: int = 2048,
        max_chunk: int = 512,
        max_prompt_tokens: int | None = None,
        max_pauses: int = 0,
        head_start: int = 2048,
        block_size: int = 16,
        prefix_cache: bool = True,
        fuse: bool = True,
        cuda_graphs: bool = True,
        tenant_weights: Mapping[str, float] | None = None,
        check_base: bool = True,
    ):
        limits = Limits(
            max_batch=max_batch, max_step_tokens=max_step_tokens, max_chunk=max_chunk,
            max_prompt_tokens=max_prompt_tokens, max_pauses=max_pauses, head_start=head_start,
        )  # fmt: skip
        self._parts: Parts = build_parts(
            base, tokenizer, dtype=dtype, kv_memory=kv_memory, adapter_memory=adapter_memory,
            slot_memory=slot_memory, max_slots=max_slots, block_size=block_size,
            fuse=fuse, cuda_graphs=cuda_graphs, check_base=check_base,
        )  # fmt: skip
        self.model, self.tokenizer = self._parts.model, self._parts.tokenizer
        self.store = self._parts.store
        try:
            self.blocks = BlockPool(self._parts.kv.num_blocks, block_size, has_cache=prefix_cache)
            self.scheduler = Scheduler(
                self.blocks,
                limits,
                self._can_admit,
                weights=tenant_weights,
                on_finish=self._release,
            )
        except BaseException:
            self._parts.close()
            raise
        super().__init__()
        self._open: dict[str, list[Sequence]] = {}  # samples of requests not yet handed out
        self._order = self._numbered = 0
        self._silent: list[Delta] = []  # ends that nobody was told yet
        self._is_closed = False
        self.steps = 0

    # --- Adapters -------------------------------------------------------------------------------

    def add_adapter(self, name: str, source: Any) -> None:
        """Register an adapter: a folder (nothing is read until a request wants it) or one attached by `loramux.attach`.

        A name that is taken is replaced: requests that run keep the content they were admitted with.
        """
        self._check_open()
        if isinstance(source, str | os.PathLike):
            self.store.register(name, Path(source))
        else:
            self.store.add(name, source)

    def remove_adapter(self, name: str) -> None:
        """Forget a name. Requests that run keep its content, those that wait for it end with an error."""
        self._check_open()
        self.store.remove(name)

    @property
    def max_length(self) -> int | None:
        """Positions of the base; None where it has no limit."""
        return self._parts.max_length

    @property
    def adapters(self) -> list[str]:
        """Names of all registered adapters."""
        return self.store.names

    def set_tenant_weight(self, tenant: str, weight: float) -> None:
        """From the next step on. A tenant of weight 2 is served twice the tokens of one of weight 1, which all have."""
        self.scheduler.shares.set_weight(tenant, weight)

    # --- Requests -------------------------------------------------------------------------------

    def add_request(self, request: Request) -> str:
        """Queue a request; returns its id. Raises ValueError, with nothing changed, if it can never be answered."""
        self._check_open()
        tokens = self._encode(request.prompt)
        params = request.params
        longest = self._parts.max_length
        if longest is not None and len(tokens) + params.max_tokens > longest:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_tokens {params.max_tokens} exceed the model's {longest} "
                "positions; shorten the prompt or lower max_tokens"
            )
        request_id = self._free_id() if request.id is None else request.id
        if request_id in self._open:
            raise ValueError(
                f"a request {request_id!r} is under way; give every request its own id"
            )
        check_mix(request.mix)
        request = Request(
            prompt=request.prompt, adapter=request.adapter, params=params, tenant=request.tenant,
            salt=request.salt, id=request_id, task=request.task,
        )  # fmt: skip
        ticket = self.store.want(request.mix)
        now = time.perf_counter()
        samples = []
        for index in range(params.n):
            sequence = Sequence(
                request, index, list(tokens), len(tokens), self._order, arrived_at=now
            )
            sequence.scratch["ticket"] = ticket
            sequence.scratch["output"] = Output(sequence, self.tokenizer, self._parts.eos)
            self._order += 1
            samples.append(sequence)
        added = []
        try:
            for sequence in samples:
                self.scheduler.add(sequence)
                added.append(sequence)
        except BaseException:
            for sequence in added:
                self.scheduler.finish(sequence, "abort")
            self._silent = [delta for delta in self._silent if delta.request_id != request_id]
            self.store.drop(ticket)
            raise
        self._open[request_id] = samples
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request now; its completions say "abort". An unknown id is no error: it may just have finished."""
        self.scheduler.abort(request_id)

    def forget(self, request_id: str) -> None:
        """End a request and drop its completions; an unknown id is no error."""
        self.abort(request_id)
        self._open.pop(request_id, None)

    def has_work(self) -> bool:
        """Whether `step` has something to do: requests that wait or run, or an end that was not told yet."""
        return self.scheduler.has_work or bool(self._silent)

    def completion(self, request_id: str) -> list[Completion] | None:
        """All samples of a finished request, handed out once; None while it runs."""
        samples = self._open.get(request_id)
        if samples is None:
            raise ValueError(
                f"no request {request_id!r} is known; its completions may have been taken"
            )
        if any(sequence.state != "finished" for sequence in samples):
            return None
        del self._open[request_id]
        return [sequence.scratch["output"].completion() for sequence in samples]

    # --- Steps ----------------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Run one forward for whoever is due, and return what their answers grew by."""
        self._check_open()
        plan = self.scheduler.schedule()
        deltas: list[Delta] = []
        if plan is not None:
            self.steps += 1
            deltas = self._run(plan)
        else:
            self._parts.runner.forget()
            if self.scheduler.has_work:
                self.store.wait(IDLE_S)
        silent, self._silent = self._silent, []
        deltas += silent
        self._tell(deltas)
        return deltas

    def _run(self, plan: StepPlan) -> list[Delta]:
        now = time.perf_counter()
        for chunk in plan.chunks:
            if chunk.sequence.started_at is None:
                chunk.sequence.started_at = now
        try:
            logits, samplers = self._parts.runner.run(plan)
            drawn = dict(zip(samplers, sample(logits, samplers, self._parts.eos), strict=True))
            for sequence, got in drawn.items():
                sequence.error = got.error
            for chunk in plan.chunks:
                if chunk.sequence.failure is not None:
                    self.scheduler.fail(chunk.sequence, chunk.sequence.failure)
            self.scheduler.commit(plan, {sequence: got.token for sequence, got in drawn.items()})
        except BaseException:
            if self.scheduler.is_planned(plan):
                self.scheduler.abandon(plan)
            for chunk in plan.chunks:
                self.scheduler.fail(chunk.sequence, "the step that held this request failed")
            raise
        # A sequence without a token ended in commit(), which left its last delta.
        going = [(s, got) for s, got in drawn.items() if s.state == "running"]
        return [self._push(s, got) for s, got in going]

    def _push(self, sequence: Sequence, got: Sampled) -> Delta:
        """Turn a token into text; what goes wrong there ends this sequence only."""
        output: Output = sequence.scratch["output"]
        assert got.token is not None
        try:
            delta = output.push(got.token, got.logprob, time.perf_counter())
        except Exception as error:
            log.exception("request %s: its text could not be made", sequence.request_id)
            sequence.error = f"its text could not be made: {error}"
            delta = output.end("error")
        if delta.finish_reason is not None:
            self.scheduler.finish(sequence, delta.finish_reason, sequence.error)
        return delta

    # --- Admission ------------------------------------------------------------------------------

    def _can_admit(self, sequence: Sequence) -> Admission:
        try:
            return self._admit(sequence)
        except ValueError as error:  # it can never be, and the message says why
            return refused(str(error))
        except Exception as error:  # a fault of this adapter must not become everybody's
            log.exception("request %s cannot be admitted", sequence.request_id)
            return refused(f"{type(error).__name__} while its adapter was looked at: {error}")

    def _admit(self, sequence: Sequence) -> Admission:
        if sequence.answered is not None:
            return READY  # it holds its lease: preempted, or asked about before
        ticket = sequence.scratch["ticket"]
        if ticket.state == "failed":
            return refused(ticket.error or "")
        if ticket.state != "ready":
            return CROWDED if ticket.is_crowded else WAIT
        lease = self.store.lease(ticket)
        if lease is None:
            return CROWDED
        problem = why_no_mix([(part.content, part.weight) for part in lease.parts])
        problem = problem or why_no_task((p.content for p in lease.parts), sequence.request.task)
        if problem:
            self.store.release(lease)
            return refused(problem)
        # All samples of a request run the same contents, whenever they are admitted.
        self._take(sequence, lease)
        for other in self._open.get(sequence.request_id, ()):
            if other is not sequence and other.state == "waiting" and other.answered is None:
                self._take(other, self.store.share(lease))
        return READY

    def _take(self, sequence: Sequence, lease: Lease) -> None:
        """The sequence holds this lease from now on; what its adapters decide is known."""
        request = sequence.request
        sequence.lease = lease
        sequence.answered = Answered(self._parts.base_digest, lease.answered)
        sequence.is_chunkable, sequence.is_shareable = lease.is_chunkable, lease.is_shareable
        sequence.prefix_seed = PrefixKey(
            salt=request.tenant if request.salt is None else request.salt,
            base=self._parts.base_digest,
            parts=tuple((digest, weight) for _, digest, weight in lease.answered),
        ).digest

    def _release(self, sequence: Sequence) -> None:
        """A sequence ended, however: its pins and its place in the loader's queue go back."""
        lease, sequence.lease = sequence.lease, None
        if lease is not None:
            self.store.release(lease)
        sequence.scratch.pop("ticket", None)
        self._parts.runner.forget()  # its program held what it ran with
        output: Output = sequence.scratch["output"]
        if not output.is_over:
            self._silent.append(output.end())

    # --- The rest -------------------------------------------------------------------------------

    def _encode(self, prompt: str | Many[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this engine has no tokenizer: give prompts as token ids")
            prompt = self.tokenizer(prompt)["input_ids"]
        tokens = [_as_token(token) for token in prompt]
        vocab = self._parts.vocab
        bad = [token for token in tokens if not 0 <= token < vocab]
        if bad:
            raise ValueError(f"token ids must be in 0..{vocab - 1}, got {bad[:3]}")
        if not tokens:
            raise ValueError("the prompt is empty; it needs at least one token")
        return tokens

    def _free_id(self) -> str:
        """An id that no open request has, whatever ids requests bring."""
        while True:
            self._numbered += 1
            request_id = f"request-{self._numbered}"
            if request_id not in self._open:
                return request_id

    def stats(self) -> dict[str, Any]:
        """Numbers for people and logs: steps, the scheduler's, the adapter store's, blocks of the KV pool."""
        return {
            "steps": self.steps,
            # Not asdict: it copies the tokens of every remembered tenant one by one, for longer than a step takes.
            "scheduler": {**vars(self.scheduler.stats())},
            "adapters": dataclasses.asdict(self.store.stats()),
            "kv_blocks": self.blocks.num_blocks,
            "kv_blocks_free": self.blocks.num_free,
            "kv_blocks_cached": self.blocks.num_cached,
            "kv_bytes": self._parts.kv.nbytes + self._parts.runner.twin.nbytes,
            "graphs": self._parts.graph_stats(),
        }

    def check_integrity(self) -> None:
        """The books of blocks, slots and pins; AssertionError names what does not add up."""
        self.blocks.check_integrity()
        self.store.check_integrity()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("this engine is closed; make a new one")

    def close(self) -> None:
        """Abort what runs, stop the loader and give the model back as it was."""
        if self._is_closed:
            return
        for request_id in list(self._open):
            self.abort(request_id)
        self._is_closed = True
        self._parts.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_token(token: Any) -> int:
    if isinstance(token, bool):
        raise ValueError(f"token ids are whole numbers, got {token!r}")
    try:
        return operator.index(token)
    except TypeError:
        raise ValueError(f"token ids are whole numbers, got {token!r}") from None
