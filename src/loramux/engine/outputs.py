"""What has been said of a sample so far: text, log-probabilities, times, and when it is over."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from loramux.engine.detokenize import Detokenizer
from loramux.engine.request import Answered, Completion, Delta, FinishReason, TokenLogprob
from loramux.engine.sequence import Sequence


class Output:
    """One per sample. `push` is told every token drawn; the scheduler has appended it already."""

    def __init__(self, sequence: Sequence, tokenizer: Any, eos: Collection[int]):
        params = sequence.request.params
        self.sequence = sequence
        self.text = ""
        self._ends = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos)
        )
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer, sequence.tokens, params.stop, params.min_tokens
            )
        elif params.stop:
            raise ValueError("stop texts need a tokenizer; use stop_token_ids")
        self._ended_at: float | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether its last delta was given out."""
        return self._is_over

    def push(self, token: int, logprob: TokenLogprob | None, now: float) -> Delta:
        """Take one more token; the delta's finish_reason says whether it was the last."""
        sequence = self.sequence
        params = sequence.request.params
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if logprob is not None:
            sequence.logprobs.append(logprob)
        if token in self._ends and sequence.num_generated > params.min_tokens:
            return self._delta((token,), logprob, self._flush(), "stop", now)
        text = "" if self._detokenizer is None else self._detokenizer.push(token)
        if self._detokenizer is not None and self._detokenizer.stopped_by is not None:
            return self._delta((token,), logprob, text, "stop", now)
        if sequence.num_generated >= params.max_tokens:
            return self._delta((token,), logprob, text + self._flush(), "length", now)
        return self._delta((token,), logprob, text, None, now)

    def _flush(self) -> str:
        return "" if self._detokenizer is None else self._detokenizer.finish()

    def _delta(
        self,
        tokens: tuple[int, ...],
        logprob: TokenLogprob | None,
        text: str,
        reason: Any,
        now: float,
    ) -> Delta:
        self.text += text
        if reason is not None:
            self._ended_at, self._is_over = now, True
        return Delta(
            request_id=self.sequence.request_id,
            index=self.sequence.index,
            text=text,
            token_ids=tokens,
            logprobs=() if logprob is None else (logprob,),
            finish_reason=reason,
        )

    def end(self, reason: FinishReason | None = None) -> Delta:
        """The sample ended without another token: an error, or an abort."""
        sequence = self.sequence
        self._is_over = True
        self._ended_at = time.perf_counter()
        text = self._flush() if reason is None else ""
        self.text += text
        return Delta(
            request_id=sequence.request_id,
            index=sequence.index,
            text=text,
            token_ids=(),
            finish_reason=reason or sequence.finish_reason,
            error=sequence.error,
        )

    def completion(self) -> Completion:
        """All of it. An end-of-text token counts as a token of the answer, and gives no text."""
        sequence = self.sequence
        start = sequence.arrived_at
        assert sequence.finish_reason is not None

        def since(moment: float | None) -> float:
            return 0.0 if moment is None else moment - start

        return Completion(
            request_id=sequence.request_id,
            index=sequence.index,
            tenant=sequence.tenant,
            text=self.text,
            token_ids=tuple(sequence.answer),
            finish_reason=sequence.finish_reason,
            answered=sequence.answered or Answered(""),
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.num_cached,
            logprobs=tuple(sequence.logprobs),
            prompt_logprobs=_of_prompt(sequence),
            error=sequence.error,
            queue_s=since(sequence.started_at),
            first_token_s=since(sequence.first_token_at),
            total_s=since(self._ended_at),
            preemptions=sequence.preemptions,
        )


def _of_prompt(sequence: Sequence) -> tuple[TokenLogprob | None, ...]:
    """One entry per token of the prompt; empty unless this sample ran all of it and was asked."""
    found = sequence.prompt_logprobs
    if sequence.request.params.prompt_logprobs is None or len(found) < sequence.num_prompt - 1:
        return ()
    return (None, *(found[place] for place in range(1, sequence.num_prompt)))
