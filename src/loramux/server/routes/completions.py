"""POST /v1/completions: texts or token ids, several prompts at once, and the prompt's own log-probabilities.

Why echo matters: evaluation harnesses score a text by asking for the log-probabilities of its own tokens
(`echo`, `logprobs`, max_tokens 0 or 1).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.engine.request import Completion, TokenLogprob
from loramux.server import asking, replies
from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.bodies import CompletionBody
from loramux.server.calls import Call
from loramux.server.choosing import choose
from loramux.server.express import Lane
from loramux.server.routes.common import (
    ANSWERS,
    answer_whole,
    beside,
    call_of,
    choice_ends,
    stream_call,
    words_of,
)

PATH = "/v1/completions"


def router() -> APIRouter:
    """The one route."""
    routes = APIRouter(tags=["inference"])
    routes.post(PATH, summary="Continue texts", responses=ANSWERS)(completions)
    return routes


async def completions(
    body: CompletionBody, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    config = request.app.state.config
    body.check_extras()
    params = asking.completion_params(body, config.limits)
    model = asking.model_of(body, config.name)
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    asked, prompts = await beside(
        asking.check_size((p for p in given if isinstance(p, str)), config.limits, "prompt"),
        lambda: asking.completion_prompts(services.tokenizer, body, config.limits),
    )
    params = asking.fit(prompts, params, services.max_length, body.max_tokens is None)
    call = call_of(
        request, services, caller,
        lambda: choose(services, config, model, asked, caller), prompts, params,
    )  # fmt: skip
    texts = _Texts(services.tokenizer, words_of(request))
    if body.stream:
        return await stream_call(
            request, call, lambda: _chunks(call, body, texts), wants_usage=body.wants_usage
        )
    return await answer_whole(request, call, lambda: _whole(call, body, texts))


LANE = Lane(PATH, CompletionBody, completions)


class _Texts:
    """Prompts back as texts, and choices' log-probabilities."""

    def __init__(self, tokenizer: Any, words: replies.Words):
        self.tokenizer, self.words = tokenizer, words

    def prompt(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(list(tokens)))


def _head(call: Call) -> dict[str, Any]:
    return {
        "id": f"cmpl-{call.id}",
        "object": "text_completion",
        "created": call.created,
        "model": call.plan.label,
    }


def _whole(call: Call, body: CompletionBody, texts: _Texts) -> dict[str, Any]:
    choices = []
    done_all = call.completions
    for place, prompt in enumerate(call.prompts):
        samples = done_all[place * call.params.n : (place + 1) * call.params.n]
        # The samples of a prompt share its run: the first one knows the prompt's log-probabilities.
        of_prompt = samples[0].prompt_logprobs
        for done in samples:
            index = place * call.params.n + done.index
            choices.append(_choice(index, prompt, done, of_prompt, body, texts))
    used = replies.usage(done_all, sum(len(prompt) for prompt in call.prompts))
    if body.max_tokens == 0:
        used["completion_tokens"], used["total_tokens"] = 0, used["prompt_tokens"]
    return {**_head(call), "choices": choices, "usage": used, "loramux": replies.ours(call)}


def _choice(
    index: int,
    prompt: Any,
    done: Completion,
    of_prompt: tuple[TokenLogprob | None, ...],
    body: CompletionBody,
    texts: _Texts,
) -> dict[str, Any]:
    # max_tokens 0 asks the engine for one token, since a request without any would never run.
    is_silent = body.max_tokens == 0
    text = "" if is_silent else done.text
    tokens = [] if is_silent else list(done.token_ids)
    found: list[TokenLogprob | None] = [] if is_silent else list(done.logprobs)
    if body.echo:
        text = texts.prompt(prompt) + text
        tokens, found = [*prompt, *tokens], [*of_prompt, *found]
    return {
        "index": index,
        "text": text,
        "logprobs": (
            None if body.logprobs is None else replies.text_logprobs(texts.words, found, tokens)
        ),
        "finish_reason": "length" if is_silent else done.finish_reason,
    }


async def _chunks(
    call: Call, body: CompletionBody, texts: _Texts
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks without the end; offsets of log-probabilities go on from chunk to chunk."""
    offsets: dict[int, int] = {}
    begun: set[int] = set()
    async for place, delta in call.deltas():
        choice_ends(delta)
        index = place * call.params.n + delta.index
        text = "" if body.max_tokens == 0 else delta.text
        if index not in begun:
            begun.add(index)
            text = texts.prompt(call.prompts[place]) + text if body.echo else text
        elif not (text or delta.finish_reason or (body.logprobs is not None and delta.logprobs)):
            continue
        logprobs = None
        if body.logprobs is not None and delta.logprobs:
            logprobs = replies.text_logprobs(
                texts.words, delta.logprobs, delta.token_ids, offsets.get(index, 0)
            )
            offsets[index] = offsets.get(index, 0) + sum(len(said) for said in logprobs["tokens"])
        yield {
            **_head(call),
            "choices": [
                {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": delta.finish_reason,
                }
            ],
        }
