"""What both inference routes do once they know the call: answer whole, or as a stream that ends with the receipt."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from loramux.engine.request import Delta, SamplingParams
from loramux.server import replies
from loramux.server.calls import Call, failed_answer
from loramux.server.errors import ApiError, envelope
from loramux.server.resolve import Plan
from loramux.server.services import Services
from loramux.server.streams import (
    DONE,
    ClientGone,
    EventStream,
    event,
    timed_out,
    to_json,
    unless_gone,
)

T = TypeVar("T")
LONG_CHARS = 8192
GONE = 499  # as nginx has it; nobody reads it
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true as server-sent events",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["id", "object", "created", "model", "choices", "usage", "loramux"],
                }
            },
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}


def call_of(
    request: Request,
    services: Services,
    caller: Any,
    choose: Callable[[], Awaitable[Plan]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> Call:
    """The call, under an id of its own."""
    return Call(services, uuid.uuid4().hex, caller, choose, prompts, params)


async def beside(num_chars: int, work: Callable[[], T]) -> T:
    """What `work` returns; in a thread where the text is so long that the event loop would feel it."""
    return await asyncio.to_thread(work) if num_chars > LONG_CHARS else work()


def words_of(request: Request) -> replies.Words:
    """Texts of tokens, kept by the application."""
    words: replies.Words = request.app.state.words
    return words


def choice_ends(delta: Delta) -> None:
    """An answer that the engine ended ends the call."""
    if delta.finish_reason in ("error", "abort"):
        raise failed_answer(delta)


async def answer_whole(
    request: Request, call: Call, body: Callable[[], dict[str, Any]]
) -> Response:
    """Wait for all answers; a client that goes away meanwhile ends the call."""

    async def run() -> Response:
        async with call:
            async with aclosing(call.deltas()) as deltas:
                async for _, delta in deltas:
                    choice_ends(delta)
            return Response(
                to_json(body()), 200, media_type="application/json",
                headers={**call.headers, **replies.header_of(call.plan), **call.receipt_headers},
            )  # fmt: skip

    try:
        async with asyncio.timeout(_limits(request).request_timeout_s):
            response = await unless_gone(request.receive, run())
    except TimeoutError:
        raise timed_out() from None
    except ClientGone:
        return Response(status_code=GONE)
    assert isinstance(response, Response)
    return response


async def stream_call(
    request: Request,
    call: Call,
    chunks: Callable[[], AsyncGenerator[dict[str, Any], None]],
    *,
    wants_usage: bool,
) -> Response:
    """Admit now, so that a refusal has its status; then send chunks as they come."""
    await call.__aenter__()
    limits = _limits(request)
    return EventStream(
        _events(call, chunks, wants_usage),
        {**call.headers, **replies.header_of(call.plan)},
        heartbeat_s=limits.heartbeat_s,
        write_timeout_s=limits.write_timeout_s,
        timeout_s=limits.request_timeout_s,
    )


async def _events(
    call: Call, chunks: Callable[[], AsyncGenerator[dict[str, Any], None]], wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The last chunk waits until the books are closed: it carries what answered, and the receipt."""
    held: dict[str, Any] | None = None
    failure: BaseException | None = None
    try:
        async with aclosing(chunks()) as source:
            async for chunk in source:
                if held is not None:
                    yield event(held)
                # As OpenAI has it: null until the last chunk, which has the usage.
                held = {**chunk, "usage": None} if wants_usage else chunk
        for chunk in _last_chunks(call, held, wants_usage):
            yield event(chunk)
        yield DONE
    except ApiError as error:
        if held is None:
            raise  # nothing was sent: the status can still say it
        yield event(held)
        call.finish(error.code)
        said = envelope(error.status, str(error), error.code, error.param)
        yield event({**said, "loramux": replies.ours(call)}) + DONE
    except BaseException as error:
        failure = error
        raise
    finally:
        await call.__aexit__(type(failure) if failure else None, failure, None)


def _last_chunks(
    call: Call, held: dict[str, Any] | None, wants_usage: bool
) -> Iterator[dict[str, Any]]:
    if held is None:
        return
    yield {**held, "loramux": replies.ours(call)}
    if wants_usage:
        head = {key: held[key] for key in ("id", "object", "created", "model")}
        num_prompt = sum(len(prompt) for prompt in call.prompts)
        yield {**head, "choices": [], "usage": replies.usage(call.completions, num_prompt)}


def _limits(request: Request) -> Any:
    return request.app.state.config.limits
