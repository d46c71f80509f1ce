"""The two routes that carry nearly all calls, without the framework's way to them.

Why: of what a call costs in the server, a third was finding the route, solving its dependencies and unwinding their
stacks, the same for every call. The routes themselves stay declared in FastAPI: from there come the OpenAPI schema and
the check that each has a policy, and a test compares the answers of both ways.

The caller is judged before the body is read, and one who has no room left is refused before it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from email.message import Message
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from loramux.errors import LoramuxError
from loramux.server.auth import authorise
from loramux.server.errors import response_to
from loramux.server.services import Services

_JSON = "application/json"


@dataclass(frozen=True)
class Lane:
    """One route. `answer(body, request, services, caller)` is what FastAPI calls as well."""

    path: str
    body: type[BaseModel]
    answer: Callable[[Any, Request, Services, Any], Awaitable[Response]]


class Express:
    """An ASGI layer: POST to a lane's path is answered here, all else by the application."""

    def __init__(self, app: Any, lanes: Iterable[Lane], services: Services) -> None:
        self._app, self._services = app, services
        self._lanes = {lane.path: lane for lane in lanes}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        lane = None
        if scope["type"] == "http" and scope["method"] == "POST":
            lane = self._lanes.get(scope["path"])
        if lane is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = lane  # its `path` is what the policy and the metrics go by
        request = Request(scope, receive, send)
        try:
            response = await self._answer(lane, request)
        except (LoramuxError, RequestValidationError, HTTPException) as error:
            response = response_to(error)
        await response(scope, receive, send)

    async def _answer(self, lane: Lane, request: Request) -> Response:
        # As FastAPI looks at it: who embeds the application may have put something else in its place.
        check = request.app.dependency_overrides.get(authorise, authorise)
        await check(request)
        self._services.check_room(request.state.caller)
        data = await _read(request)
        await check(request)  # the key may have been revoked while the body came
        body = parse(lane.body, data, request.headers.get("content-type"))
        return await lane.answer(body, request, self._services, request.state.caller)


async def _read(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise HTTPException(400, "There was an error parsing the body") from None


def parse(model: type[BaseModel], data: bytes, content_type: str | None) -> Any:
    """The body, or RequestValidationError as FastAPI has it."""
    if not data:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": ""}])
    value: Any = data
    if content_type == _JSON or _is_json(content_type):
        try:
            value = json.loads(data)
        except json.JSONDecodeError as error:
            place = ("body", error.pos)
            raise RequestValidationError(
                [{"type": "json_invalid", "loc": place, "msg": ""}]
            ) from None
        except (ValueError, RecursionError):  # bytes that are no text, nesting without an end
            raise HTTPException(400, "There was an error parsing the body") from None
    try:
        return model.model_validate(value, from_attributes=True)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


def _is_json(content_type: str | None) -> bool:
    if not content_type:
        return False
    parsed = Message()
    parsed["content-type"] = content_type
    subtype = parsed.get_content_subtype()
    return parsed.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
