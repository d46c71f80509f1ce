"""The limits of a step, and what the slot tier answers when a sequence asks to be admitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a step may hold.

    max_batch: sequences that run at once. max_step_tokens: tokens of one forward; a prompt that must run in one piece
    and is longer runs alone. max_chunk: tokens of one prompt in one step. max_prompt_tokens: tokens of all prompts in
    a step in which others decode, None for no further limit; it bounds the wait between two tokens of an answer.
    patience: admissions that may overtake a sequence for which no slot is free; then the slots are drained for it.
    max_probes: waiting sequences asked about in one step. max_pauses: steps in a row in which the answers of a tenant
    who crowds another make room for that one's first token (yielding.py), 0 for none. head_start: tokens that a tenant
    who used less than its share may be served before the others (fairness.py).
    """

    max_batch: int = 64
    max_step_tokens: int = 2048
    max_chunk: int = 512
    max_prompt_tokens: int | None = None
    patience: int = 64
    max_probes: int = 64
    max_pauses: int = 0
    head_start: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_chunk", "max_prompt_tokens", "max_probes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("patience", "max_pauses", "head_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_step_tokens < self.max_batch:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_batch ({self.max_batch}): a step must hold "
                f"one token of every sequence; raise it or lower max_batch"
            )


@dataclass(frozen=True)
class Admission:
    """What becomes of a sequence that asks to run.

    ready: the sequence holds its lease, and what its adapters decide (prefix_seed, is_chunkable, is_shareable)
    is set.

    wait: not yet, its adapters are being loaded; others overtake. crowded: not yet, running sequences pin what it
    needs; others overtake for a while. refused: never, for the reason given.
    """

    kind: Literal["ready", "wait", "crowded", "refused"]
    reason: str = ""


READY = Admission("ready")
WAIT = Admission("wait")
CROWDED = Admission("crowded")


def refused(reason: str) -> Admission:
    return Admission("refused", reason)
