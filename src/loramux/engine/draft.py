"""A step while it is being planned: how many tokens it still holds, and its chunks in batch order."""

from __future__ import annotations

from loramux.engine.admission import Limits
from loramux.engine.blocks import Copy
from loramux.engine.sequence import Chunk, Sequence, StepPlan


class Draft:
    """budget: tokens the step still holds. Decodes are planned first, then prompts under way, then new sequences.

    was_alone: whether the step before held nothing but one prompt that exceeds a step.
    """

    def __init__(self, limits: Limits, *, was_alone: bool = False) -> None:
        self.budget = limits.max_step_tokens
        self.copies: list[Copy] = []
        self.is_alone = False
        self.was_alone = was_alone
        self._limits = limits
        self._decodes: dict[Sequence, Chunk] = {}
        self._singles: list[Chunk] = []  # one token of a new sequence whose other tokens are found
        self._pieces: list[Chunk] = []
        self._prompt_tokens = 0

    def add_decode(self, sequence: Sequence) -> None:
        self._decodes[sequence] = Chunk(sequence, sequence.num_computed, 1)
        self.budget -= 1

    def drop_decode(self, sequence: Sequence) -> None:
        """The sequence was preempted for another one's sake, planned or not."""
        if self._decodes.pop(sequence, None) is not None:
            self.budget += 1

    def drop_decodes(self, tenant: str) -> None:
        """The tenant's answers go on in a later step. Last thing of all: the room is not given to others."""
        self._decodes = {s: chunk for s, chunk in self._decodes.items() if s.tenant != tenant}

    @property
    def decode_tenants(self) -> set[str]:
        """Whose answers grow in this step."""
        return {sequence.tenant for sequence in self._decodes}

    @property
    def first_token_tenants(self) -> set[str]:
        """Whose prompts run here that were not answered yet."""
        chunks = (*self._singles, *self._pieces)
        return {c.sequence.tenant for c in chunks if not c.sequence.num_generated}

    def room(self) -> int:
        """Tokens of one prompt that may still run in this step."""
        cap = self._limits.max_prompt_tokens
        left = self.budget
        if cap is not None and self._decodes:
            left = min(left, cap - self._prompt_tokens)
        return max(0, min(left, self._limits.max_chunk))

    def add_piece(self, sequence: Sequence) -> None:
        """As much of what it has still to run as there is room for: nothing, perhaps."""
        count = min(sequence.num_tokens - sequence.num_computed, self.room())
        if count:
            self._add(sequence, count)

    def takes_whole(self, count: int) -> bool:
        """Whether a prompt of `count` tokens can run in one piece: beside what is planned, or else alone.

        Alone only if nothing but decodes has to wait for it, and not twice in a row, or they would wait for ever.
        """
        if self.fits(count):
            return True
        return not self._prompt_tokens and not (self.was_alone and self._decodes)

    def add_whole(self, sequence: Sequence) -> None:
        """All of its tokens. If they exceed the step, it holds nothing else: decodes go on in the next one."""
        if not self.fits(sequence.num_tokens):
            self._decodes.clear()
            self.is_alone = True
        self._add(sequence, sequence.num_tokens)
        if self.is_alone:
            self.budget = 0

    def fits(self, count: int) -> bool:
        """Whether a whole prompt of `count` tokens has room beside what is planned."""
        # The limit on prompts beside decodes cannot cut this one; it still keeps it from joining others.
        is_capped = self._limits.max_prompt_tokens is not None and bool(self._decodes)
        return count <= self.budget and not (is_capped and self._prompt_tokens)

    def _add(self, sequence: Sequence, count: int) -> None:
        chunk = Chunk(sequence, sequence.num_computed, count)
        is_single = count == 1 and chunk.start > 0
        (self._singles if is_single else self._pieces).append(chunk)
        self.budget -= count
        self._prompt_tokens += count

    def plan(self) -> StepPlan | None:
        """Single tokens behind a context first (decodes, then new sequences that need no more), then the rest."""
        chunks = (*self._decodes.values(), *self._singles, *self._pieces)
        return StepPlan(chunks, tuple(self.copies)) if chunks else None
