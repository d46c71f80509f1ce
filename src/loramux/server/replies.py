"""Answers in OpenAI's words: choices, usage, log-probabilities of both shapes, and ours under `loramux`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from loramux.engine.detokenize import UNFINISHED
from loramux.engine.request import Completion, TokenLogprob
from loramux.server.calls import Call
from loramux.server.resolve import Plan

_PLAIN = "/@*+:=, ()[]"  # of names, versions and weights
LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's choice


class Words:
    """Tokens as texts, for log-probabilities; each is decoded once."""

    def __init__(self, tokenizer: Any, limit: int = 65536):
        self._tokenizer, self._limit = tokenizer, limit
        self._kept: dict[int, str] = {}
        self._bytes_of: dict[str, int] | None = None  # of a byte-level vocabulary's letters

    def bytes_of(self, token: int) -> list[int]:
        """A token's own bytes, so that those of several tokens are together the character that none of them is."""
        text = self(token)
        if UNFINISHED not in text:
            return list(text.encode())
        piece = str(self._tokenizer.convert_ids_to_tokens([token])[0])
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):  # SentencePiece's fallback
            return [int(found[1], 16)]
        if self._bytes_of is None:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            alphabet = bytes_to_unicode()  # type: ignore[no-untyped-call]
            self._bytes_of = {letter: byte for byte, letter in alphabet.items()}
        if all(letter in self._bytes_of for letter in piece):
            return [self._bytes_of[letter] for letter in piece]
        return list(text.encode())

    def __call__(self, token: int) -> str:
        found = self._kept.get(token)
        if found is None:
            found = str(self._tokenizer.decode([token]))
            if len(self._kept) < self._limit:
                self._kept[token] = found
        return found


def usage(completions: Sequence[Completion], num_prompt: int) -> dict[str, Any]:
    """Tokens of a call; a prompt counts once, however many samples it has."""
    generated = sum(len(done.token_ids) for done in completions)
    cached = sum(done.cached_tokens for done in completions if done.index == 0)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": generated,
        "total_tokens": num_prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def ours(call: Call) -> dict[str, Any]:
    """The field `loramux` of a body or of the last chunk: what answered, why, and the receipt."""
    plan = call.plan
    said: dict[str, Any] = {
        "adapters": _adapters(plan),
        "routing": plan.routing,
        "receipt": call.receipt,
    }
    if plan.router is not None:
        said["router"] = plan.router
    return said


def _adapters(plan: Plan) -> list[dict[str, Any]]:
    if plan.assembled is not None:  # the router weighs them for every token
        found = plan.assembled.versions.items()
        return [{"ref": v.ref, "digest": digest, "weight": None} for digest, v in found]
    return [
        {"ref": version.ref, "digest": digest, "weight": weight}
        for version, (digest, weight) in zip(plan.versions, plan.mix, strict=True)
    ]


# --- Log-probabilities ------------------------------------------------------------------------------


def chat_logprobs(words: Words, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As /v1/chat/completions has them."""
    return {
        "content": [
            {
                **_entry(words, each.token, each.logprob),
                "top_logprobs": [_entry(words, token, value) for token, value in each.top],
            }
            for each in found
        ],
        "refusal": None,
    }


def _entry(words: Words, token: int, logprob: float) -> dict[str, Any]:
    return {"token": words(token), "logprob": _finite(logprob), "bytes": words.bytes_of(token)}


def text_logprobs(
    words: Words, found: Sequence[TokenLogprob | None], tokens: Sequence[int], offset: int = 0
) -> dict[str, Any]:
    """As /v1/completions has them. `found` holds None for a first prompt token, which nothing predicts."""
    texts, offsets = [], []
    for token in tokens:
        text = words(token)
        texts.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if each is None else _finite(each.logprob) for each in found],
        "top_logprobs": [None if each is None else _best(words, each) for each in found],
        "text_offset": offsets,
    }


def _best(words: Words, found: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and the chosen one. Of tokens with one text (parts of a character) the likeliest stays."""
    best: dict[str, float] = {}
    for token, value in (*found.top, (found.token, found.logprob)):
        text, value = words(token), _finite(value)
        best[text] = max(value, best.get(text, value))
    return best


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def header_of(plan: Any) -> Mapping[str, str]:
    """x-loramux-adapter: what answered, as the reply's `model` says it."""
    # A base may be called anything, and a header is ASCII.
    return {"x-loramux-adapter": quote(plan.label, safe=_PLAIN)}
