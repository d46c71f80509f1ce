"""What is asked and what is answered: a request, how to sample, a finished completion with the digests behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The default is greedy.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the two OpenAI penalties 0 are off.
    `seed` makes a sampled answer repeatable whatever shares the batch; sample j of `n` uses seed + j. `logprobs`: how
    many most likely tokens to report beside the chosen one (0: the chosen one alone), of the distribution before
    temperature, penalties and cuts. `prompt_logprobs`: the same for the tokens of the prompt, which then runs without
    cached blocks. `stop` texts end the answer and are not part of it.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, list | tuple):
                raise ValueError(f"{name} must be a list, got {given!r}")
            object.__setattr__(self, name, tuple(given or ()))
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs", "prompt_logprobs"):
                continue
            whole = name in _WHOLE
            right = isinstance(value, int if whole else (int, float)) and not isinstance(
                value, bool
            )
            if not right or not least <= value <= most:  # no comparison holds for NaN
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{name} must be {kind} in {least}..{most}, got {value!r}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.top_p <= 0:
            raise ValueError(f"top_p must be above 0, got {self.top_p}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be texts that are not empty, got {self.stop!r}")
        if not all(type(token) is int and token >= 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be token ids, got {self.stop_token_ids!r}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


_LARGE = 2**63 - 1
_WHOLE = {"max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs"}
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 2**31),
    ("min_tokens", 0, 2**31),
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 2**31),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("seed", 0, _LARGE),
    ("n", 1, 128),
    ("logprobs", 0, 100),
    ("prompt_logprobs", 0, 100),
)

Mix = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt (text, or token ids) and what shall answer it.

    adapter: None for the base, the name of an adapter, or {name: weight} for a weighted mix. `tenant` is who is served
    fairly; requests share cached prefixes only under one `salt` (the tenant's name if none is given). The engine
    numbers requests that bring no id. `task` is told to adapters that weigh their experts by the task.
    """

    prompt: str | Sequence[int]
    adapter: str | Mapping[str, float] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = "default"
    salt: str | None = None
    id: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        for name in ("tenant", "salt", "id", "task"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name != "tenant"):
                raise ValueError(f"{name} must be a text, got {value!r}")
        if not isinstance(self.params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {type(self.params).__name__}")
        if self.adapter is None or isinstance(self.adapter, str):
            return
        if not isinstance(self.adapter, Mapping):
            raise ValueError(
                f"adapter must be a name, {{name: weight}} or None for the base, got {self.adapter!r}"
            )
        for name, weight in self.adapter.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not isinstance(name, str) or not is_number:
                raise ValueError(f"a mix is {{name: weight}}, got {name!r}: {weight!r}")

    @property
    def mix(self) -> Mix:
        """((name, weight), ...) in the order given; empty for the base."""
        if self.adapter is None:
            return ()
        if isinstance(self.adapter, str):
            return ((self.adapter, 1.0),)
        return tuple((name, float(weight)) for name, weight in self.adapter.items())


@dataclass(frozen=True)
class Answered:
    """Which weights answered: digests of contents, never names alone. `parts`: (name, digest, weight) as admitted."""

    base: str
    parts: tuple[tuple[str, str, float], ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability; `top` holds the most likely alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


NOT_FINITE = "not_finite"  # the model's logits, with these adapters


class Reason(str):
    """Why a sample ended with an error, for people; programs go by `code`, "" where there is none.

    Codes: NOT_FINITE, and that of the error an adapter's reader raised (`formats.errors`).
    """

    code: str

    def __new__(cls, text: str, code: object = "") -> Reason:
        made = super().__new__(cls, text)
        made.code = code if isinstance(code, str) else ""
        return made


NO_TOKEN = Reason("no token: the logits are not finite", NOT_FINITE)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a streamed answer grew by. `finish_reason` is set on the last one of a sample; `error` may be a `Reason`."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished sample. Times are seconds since the request arrived (queue_s: until its first step)."""

    request_id: str
    index: int
    tenant: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    answered: Answered
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    # Of the first sample; None for the first token.
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    error: str | None = None
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    preemptions: int = 0


def as_request(request: Request | str | Sequence[int], params: SamplingParams | None) -> Request:
    """Plain texts and token ids become requests to the base."""
    if isinstance(request, Request):
        return request
    return Request(prompt=request, params=params or SamplingParams())
