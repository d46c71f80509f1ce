"""Whether an answer in a storm is right: every token, the digests that it names, and some log-probabilities.

Letters: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loramux.bench.markers import Marked, merge, restore
from loramux.engine.request import Completion, Request

CLOSE = 1e-4  # log-probabilities in fp32, whose logits are about 10
MOST_PROBLEMS = 20


@dataclass
class Outcome:
    """What happened. `problems` is empty if all claims held; of many only the first are kept."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    worst_logprob: float = 0.0

    def add(self, problem: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": dict(sorted(self.counts.items())),
            "worst_logprob": self.worst_logprob,
            "problems": self.problems,
        }


class History:
    """What every name has stood for, in order; None where it stood for nothing."""

    def __init__(self, names: Sequence[str]):
        self._all: dict[str, list[Marked | None]] = {name: [None] for name in names}

    def now(self, name: str) -> Marked | None:
        return self._all[name][-1]

    def put(self, name: str, content: Marked | None) -> None:
        self._all[name].append(content)

    def mark(self, names: Sequence[str]) -> dict[str, int]:
        """A moment, as far as these names go."""
        return {name: len(self._all[name]) - 1 for name in names}

    def between(self, name: str, since: int, until: int) -> list[Marked | None]:
        return self._all[name][since : until + 1]


@dataclass
class Asked:
    """A request under way; `until`: the moment of its first token, if there was one."""

    request: Request
    since: dict[str, int]
    until: dict[str, int] | None = None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.request.mix]


class Judge:
    """said: what the base by itself answers to each prompt. base: the model to compute log-probabilities with."""

    def __init__(
        self,
        base: Any,
        said: Mapping[tuple[int, ...], Sequence[int]],
        by_digest: Mapping[str, Marked],
        history: History,
        outcome: Outcome,
    ):
        self.base, self.said, self.by_digest = base, said, by_digest
        self.history, self.outcome = history, outcome

    def check(self, asked: Asked, done: Completion) -> None:
        """Add what is wrong with a completion to the outcome."""
        counts = self.outcome.counts
        counts[f"finished, {done.finish_reason}"] += 1
        counts["tokens"] += len(done.token_ids)
        counts["cached tokens"] += done.cached_tokens
        counts["preemptions"] += done.preemptions
        problem = (
            self._error(asked, done) or self._answered(asked, done) or self._tokens(asked, done)
        )
        if problem is not None:
            self.outcome.add(f"{done.request_id} for {asked.request.adapter}: {problem}")
        elif done.logprobs:
            self._logprobs(asked, done)

    def _window(self, asked: Asked, name: str) -> list[Marked | None]:
        until = asked.until or self.history.mark(asked.names)
        return self.history.between(name, asked.since[name], until[name])

    def _error(self, asked: Asked, done: Completion) -> str | None:
        if done.finish_reason != "error":
            return None
        removed = any(None in self._window(asked, name) for name in asked.names)
        if removed and "removed" in (done.error or ""):
            return None
        return f"ended with {done.error!r}"

    def _answered(self, asked: Asked, done: Completion) -> str | None:
        parts = done.answered.parts
        if not parts:  # the base, or it ended before it was admitted
            return f"{asked.names} are not in answered" if asked.names and done.token_ids else None
        if [(name, weight) for name, _, weight in parts] != list(asked.request.mix):
            return f"answered says {parts}"
        for name, digest, _ in parts:
            content = self.by_digest.get(digest)
            if content is None or content.name != name:
                return f"{name!r} was answered by {content or digest}"
            window = self._window(asked, name)
            if content not in window:
                return f"{name!r} was answered by version {content.version}, not by one of {window}"
        return None

    def _tokens(self, asked: Asked, done: Completion) -> str | None:
        request, tokens = asked.request, list(done.token_ids)
        if done.finish_reason == "length" and len(tokens) != request.params.max_tokens:
            return f"ended after {len(tokens)} of {request.params.max_tokens} tokens"
        if not asked.names:
            wanted = list(self.said[tuple(request.prompt)])[: len(tokens)]  # type: ignore[arg-type]
        elif tokens:
            wanted = [self.by_digest[done.answered.parts[0][1]].marker] * len(tokens)
        else:
            return None
        return None if tokens == wanted else f"foreign tokens: {tokens} instead of {wanted}"

    @torch.no_grad()
    def _logprobs(self, asked: Asked, done: Completion) -> None:
        mix = {self.by_digest[digest].folder: weight for _, digest, weight in done.answered.parts}
        prompt = list(asked.request.prompt)
        kept = merge(self.base, mix)
        ids = torch.tensor([[*prompt, *done.token_ids]])
        rows_TV = self.base(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        restore(self.base, kept)
        for row_V, given in zip(rows_TV, done.logprobs, strict=True):
            for token, logprob in ((given.token, given.logprob), *given.top):
                off = abs(float(row_V[token]) - logprob)
                self.outcome.worst_logprob = max(self.outcome.worst_logprob, off)
                if not off <= CLOSE:
                    self.outcome.add(f"{done.request_id}: a log-probability is off by {off:.2e}")
                    return
        self.outcome.counts["answers with log-probabilities checked"] += 1
