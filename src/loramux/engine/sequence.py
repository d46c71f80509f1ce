"""A sample under way: tokens so far, how many of them are in the KV pool, its blocks and the adapters it pins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loramux.engine.request import Answered, FinishReason, Request, TokenLogprob

SequenceState = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Sequence:
    """One of the `n` samples of a request.

    tokens: prompt and answer; tokens[:num_computed] have their keys and values in the pool, in `blocks` (ids, in
    order). `lease` pins the adapter contents it was admitted with. `routes` are the gates decided on the prompt: they
    belong to the sequence, survive preemption and are never decided twice. is_chunkable / is_shareable are False for
    prompt-routed adapters: their prompt runs in one piece, and their KV serves no other prompt.
    """

    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    order: int  # of arrival, unique
    prefix_seed: str = (
        ""  # what its cached blocks are keyed by, before any token (keys.PrefixKey.digest)
    )
    is_chunkable: bool = True
    is_shareable: bool = True
    lease: Any = None
    answered: Answered | None = None
    state: SequenceState = "waiting"
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens taken from the prefix cache at first admission
    routes: Any = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    # By position; if asked for.
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    error: str | None = None
    failure: str | None = (
        None  # what went wrong with it in the step that runs, and with nothing else there
    )
    preemptions: int = 0
    arrived_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    scratch: dict[str, Any] = field(
        default_factory=dict
    )  # detokenizer, random generator: owners key their own

    @property
    def request_id(self) -> str:
        assert self.request.id is not None
        return self.request.id

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.num_prompt :]


@dataclass(frozen=True, eq=False)
class Chunk:
    """tokens[start : start + count] of a sequence, to run in this step. `samples`: the last one's logits are wanted."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == self.sequence.num_tokens


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What the next forward runs, in batch order: decodes first (one token each), then pieces of prompts.

    copies: (from block, to block) to copy in the KV pool before the forward (a block shared by several samples that one
    of them is about to write).
    """

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)
