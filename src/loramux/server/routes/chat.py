"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server import asking, replies
from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.bodies import ChatBody
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

PATH = "/v1/chat/completions"


def router() -> APIRouter:
    """The one route."""
    routes = APIRouter(tags=["inference"])
    routes.post(PATH, summary="Answer a conversation", responses=ANSWERS)(chat)
    return routes


async def chat(
    body: ChatBody, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    config = request.app.state.config
    body.check_extras()
    params = asking.chat_params(body, config.limits)
    model = asking.model_of(body, config.name)
    asked, prompt = await beside(
        asking.check_size((message.text for message in body.messages), config.limits, "messages"),
        lambda: asking.chat_prompt(services.tokenizer, body, config.limits),
    )
    is_default = body.max_tokens is None and body.max_completion_tokens is None
    params = asking.fit([prompt], params, services.max_length, is_default)
    call = call_of(
        request, services, caller,
        lambda: choose(services, config, model, asked, caller), [prompt], params,
    )  # fmt: skip
    words = words_of(request)
    if body.stream:
        return await stream_call(
            request, call, lambda: _chunks(call, body, words), wants_usage=body.wants_usage
        )
    return await answer_whole(request, call, lambda: _whole(call, body, words))


LANE = Lane(PATH, ChatBody, chat)


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{call.id}",
        "object": kind,
        "created": call.created,
        "model": call.plan.label,
    }


def _whole(call: Call, body: ChatBody, words: replies.Words) -> dict[str, Any]:
    choices = [
        {
            "index": done.index,
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": replies.chat_logprobs(words, done.logprobs) if body.logprobs else None,
            "finish_reason": done.finish_reason,
        }
        for done in call.completions
    ]
    return {
        **_head(call, "chat.completion"),
        "choices": choices,
        "usage": replies.usage(call.completions, len(call.prompts[0])),
        "loramux": replies.ours(call),
    }


async def _chunks(
    call: Call, body: ChatBody, words: replies.Words
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks without the end; a choice starts with its role."""
    head = _head(call, "chat.completion.chunk")
    begun: set[int] = set()
    async for _, delta in call.deltas():
        choice_ends(delta)
        if delta.index not in begun:
            begun.add(delta.index)
            said: dict[str, Any] = {"role": "assistant", "content": delta.text}
        elif delta.text or delta.finish_reason or (body.logprobs and delta.logprobs):
            said = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        else:
            continue
        yield {
            **head,
            "choices": [
                {
                    "index": delta.index,
                    "delta": said,
                    "logprobs": replies.chat_logprobs(words, delta.logprobs) if body.logprobs else None,
                    "finish_reason": delta.finish_reason,
                }
            ],
        }  # fmt: skip
