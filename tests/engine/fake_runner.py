"""A model made of hashes, for tests of the scheduler: what it reads from the pool must be what belongs there.

The "keys and values" of a token are a number made of everything that may decide them: the content that answers, the
routes and all tokens up to it. A step checks the whole context of each chunk before it writes, so a block shared
wrongly, given out twice, not copied or not computed is seen at once. The next token is a function of the same number,
so the right answer of a request can be computed without any scheduler.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from zlib import crc32

from loramux.engine.admission import READY, Admission, Limits
from loramux.engine.blocks import BlockPool
from loramux.engine.request import Request, SamplingParams
from loramux.engine.scheduler import Scheduler
from loramux.engine.sequence import Chunk, Sequence, StepPlan


def states(content: str, routes: int | None, tokens: list[int]) -> list[int]:
    """The number that stands for the keys and values of each token."""
    # Not hash(content): that of a text differs from process to process, and failures should repeat.
    found, state = [], hash((crc32(content.encode()), routes or 0))
    for token in tokens:
        state = hash((state, token))
        found.append(state)
    return found


def routes_of(prompt: list[int]) -> int:
    return hash((1, *prompt))


def right_answer(sequence: Sequence) -> list[int]:
    """What the request must answer, computed on its own."""
    prompt = sequence.tokens[: sequence.num_prompt]
    routes = None if sequence.is_chunkable else routes_of(prompt)
    tokens = list(prompt)
    for _ in range(sequence.request.params.max_tokens):
        tokens.append(next_token(sequence, states(sequence.prefix_seed, routes, tokens)[-1]))
    return tokens[sequence.num_prompt :]


def next_token(sequence: Sequence, state: int) -> int:
    return hash((state, sequence.index)) % 7


@dataclass(eq=False)
class FakeRunner:
    """A scheduler over a small pool, with the engine's part played by a few lines."""

    num_blocks: int = 16
    block_size: int = 4
    limits: Limits = field(default_factory=lambda: Limits(max_batch=8, max_step_tokens=64))
    has_cache: bool = True
    can_admit: Callable[[Sequence], Admission] = lambda sequence: READY
    weights: Mapping[str, float] | None = None
    poisoned: set[Sequence] = field(default_factory=set)  # their logits are not finite

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size, has_cache=self.has_cache)
        self.finished: list[Sequence] = []
        self.scheduler = Scheduler(
            self.pool,
            self.limits,
            self.can_admit,
            weights=self.weights,
            on_finish=self.finished.append,
        )
        self.memory = [[0] * self.block_size for _ in range(self.num_blocks)]
        self.plans: list[list[tuple[Sequence, int, int]]] = []
        self._orders = count()
        self._ids = count()

    def add(
        self,
        prompt: list[int],
        *,
        max_tokens: int = 4,
        n: int = 1,
        tenant: str = "t",
        content: str = "base",
        is_routed: bool = False,
    ) -> list[Sequence]:
        request = Request(
            prompt=prompt,
            adapter=None if content == "base" else content,
            params=SamplingParams(max_tokens=max_tokens, n=n),
            tenant=tenant,
            id=f"r{next(self._ids)}",
        )
        samples = [
            Sequence(
                request,
                index,
                list(prompt),
                len(prompt),
                next(self._orders),
                prefix_seed=content,
                is_chunkable=not is_routed,
                is_shareable=not is_routed,
            )
            for index in range(n)
        ]
        for sequence in samples:
            self.scheduler.add(sequence)
        return samples

    def step(self) -> bool:
        """Plan, run, commit, finish. False if nothing could run."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return False
        assert all(chunk.sequence.state == "running" for chunk in plan.chunks)
        self.commit(plan)
        return True

    def commit(self, plan: StepPlan) -> None:
        """The second half of a step: run and finish."""
        self._check_limits(plan)
        self.scheduler.commit(plan, self.run(plan))
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.num_generated >= sequence.request.params.max_tokens:
                self.scheduler.finish(sequence, "length")
        self.scheduler.check_integrity()

    def run_until_idle(self, most: int = 10_000) -> None:
        steps = 0
        while self.scheduler.has_work:
            assert self.step(), "there is work, and nothing runs"
            steps += 1
            assert steps < most, "the scheduler makes no progress"

    def run(self, plan: StepPlan) -> dict[Sequence, int | None]:
        self.plans.append([(c.sequence, c.start, c.count) for c in plan.chunks])
        sources = {source for source, _ in plan.copies}
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets) and not sources & set(targets)
        for source, target in plan.copies:
            self.memory[target] = list(self.memory[source])
        written: set[tuple[int, int]] = set()
        drawn: dict[Sequence, int | None] = {}
        for chunk in plan.chunks:
            if chunk.sequence.state == "running":  # else it was aborted after it was planned
                token = self._run_chunk(chunk, written)
                if chunk.samples:
                    drawn[chunk.sequence] = token
        return drawn

    def _run_chunk(self, chunk: Chunk, written: set[tuple[int, int]]) -> int | None:
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        if not sequence.is_chunkable and sequence.routes is None:
            assert (start, end) == (0, sequence.num_prompt), "routes are decided on a whole prompt"
            sequence.routes = routes_of(sequence.tokens)
        right = states(sequence.prefix_seed, sequence.routes, sequence.tokens[:end])
        for position in range(start):
            assert self._at(sequence, position) == right[position], "foreign keys and values"
        for position in range(start, end):
            block = sequence.blocks[position // self.block_size]
            place = (block, position % self.block_size)
            assert place not in written, "two sequences write to one place"
            written.add(place)
            self.memory[block][place[1]] = right[position]
        return None if sequence in self.poisoned else next_token(sequence, right[-1])

    def _at(self, sequence: Sequence, position: int) -> int:
        block = sequence.blocks[position // self.block_size]
        return self.memory[block][position % self.block_size]

    def _check_limits(self, plan: StepPlan) -> None:
        sequences = [chunk.sequence for chunk in plan.chunks]
        assert len(set(sequences)) == len(sequences)
        assert len(sequences) <= self.limits.max_batch
        assert plan.num_tokens <= self.limits.max_step_tokens or len(sequences) == 1
        singles = [chunk.count == 1 and chunk.start > 0 for chunk in plan.chunks]
        assert singles == sorted(singles, reverse=True), "single tokens come first"

    def check_is_empty(self) -> None:
        """All books are back at zero."""
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert self.pool.num_free == self.pool.num_blocks
        assert not self.scheduler.shares.busy


def tokens_of(seed: int, length: int, vocabulary: int = 3) -> list[int]:
    """A prompt of few different tokens, so that prompts share beginnings by chance too."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary) for _ in range(length)]
