"""Block tables of sequences: what a new one finds computed already, what it needs beside, what it leaves to others.

Why apart from the scheduler: who runs is one question, where its keys and values lie another. A sequence gets blocks
for all its tokens at once when it is admitted (start), one more as it grows (grow), and gives all of them back
together (stop).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from loramux.engine.blocks import BlockPool, Copy
from loramux.engine.keys import extend_hashes
from loramux.engine.sequence import Sequence


@dataclass(eq=False)
class _Chain:
    """hashes: of a sequence's full blocks, kept over preemptions. num_listed: leading blocks that the cache knows."""

    hashes: list[str] = field(default_factory=list)
    num_listed: int = 0


class Tables:
    """The tables of all running sequences of one pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.num_found = 0  # tokens found in the prefix cache
        self._chains: dict[Sequence, _Chain] = {}

    def missing(self, sequence: Sequence) -> int:
        """Blocks it needs before its last token can run."""
        return self.pool.blocks_for(sequence.num_tokens) - len(sequence.blocks)

    def grow(self, sequence: Sequence, count: int) -> None:
        sequence.blocks.extend(self.pool.allocate(count))

    def start(
        self, sequence: Sequence, *, source: Sequence | None, finds: bool, spare: int
    ) -> list[Copy] | None:
        """Blocks for all its tokens, num_computed of which are computed already; None if fewer than `spare` stay free.

        source: a running sample of the same request whose prompt is computed. finds: it may look into the prefix cache.
        The copies returned are to be made before the step. The last token is always left to run: it gives the logits.
        """
        if source is not None:
            return self._fork(sequence, source, spare)
        found = self._find(sequence) if finds else []
        needed = self.pool.blocks_for(sequence.num_tokens) - len(found)
        if self.pool.num_free - self.pool.num_idle(found) - needed < spare:
            return None
        self.pool.hold(found)
        sequence.blocks = found + self.pool.allocate(needed)
        sequence.num_computed = len(found) * self.pool.block_size
        self._chain(sequence).num_listed = len(found)
        self.num_found += sequence.num_computed
        return []

    def _fork(self, sequence: Sequence, source: Sequence, spare: int) -> list[Copy] | None:
        # The prompt's last token runs again for each sample, so that each has logits of its own. This holds also for a
        # sample that was preempted: the source's blocks are good for the prompt, not for another sample's answer.
        shared = sequence.num_prompt - 1
        needed = self.pool.blocks_for(sequence.num_tokens) - shared // self.pool.block_size
        if self.pool.num_free - needed < spare:
            return None
        sequence.blocks, copy = self.pool.fork(source.blocks, shared)
        self.grow(sequence, self.missing(sequence))
        sequence.num_computed = shared
        self._chain(sequence).num_listed = 0
        return [] if copy is None else [copy]

    def _find(self, sequence: Sequence) -> list[int]:
        # What is found does not run, and says nothing of its tokens' probabilities.
        if not self._is_listed(sequence) or sequence.request.params.prompt_logprobs is not None:
            return []
        full = (sequence.num_tokens - 1) // self.pool.block_size
        return self.pool.find(self._hashes(sequence, full)[:full])

    def list_full(self, sequence: Sequence) -> None:
        """Its full blocks can be found by others from now on."""
        full = sequence.num_computed // self.pool.block_size
        chain = self._chain(sequence)
        if full == chain.num_listed or not self._is_listed(sequence):
            return
        hashes = self._hashes(sequence, full)
        for index in range(chain.num_listed, full):
            self.pool.register(sequence.blocks[index], hashes[index])
        chain.num_listed = full

    def _is_listed(self, sequence: Sequence) -> bool:
        # Without a key nothing says whose weights made the blocks: no sharing then.
        return sequence.is_shareable and self.pool.has_cache and sequence.prefix_seed != ""

    def _hashes(self, sequence: Sequence, count: int) -> list[str]:
        hashes = self._chain(sequence).hashes
        extend_hashes(hashes, sequence.prefix_seed, sequence.tokens, count, self.pool.block_size)
        return hashes

    def _chain(self, sequence: Sequence) -> _Chain:
        return self._chains.setdefault(sequence, _Chain())

    def stop(self, sequence: Sequence) -> None:
        """All its blocks go back; its hashes stay for when it runs again."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def forget(self, sequence: Sequence) -> None:
        """It will not run again."""
        self._chains.pop(sequence, None)

    def check_integrity(self, running: Iterable[Sequence], unfinished: Container[Sequence]) -> None:
        """Tables and pool agree; nobody writes what others read; what finished is forgotten."""
        tables = list(running)
        self.pool.check_integrity(sequence.blocks for sequence in tables)
        assert all(sequence in unfinished for sequence in self._chains)
        for sequence in tables:
            assert len(sequence.blocks) >= self.pool.blocks_for(sequence.num_tokens - 1)
            for block in sequence.blocks[sequence.num_computed // self.pool.block_size :]:
                assert self.pool.is_private(block), f"block {block} is read by others and written"
