"""Every error that leaves the server: OpenAI's envelope, a stable code, no path and no name that is not the caller's.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from loramux.engine.aio import EngineClosedError
from loramux.errors import LoramuxError
from loramux.formats.errors import FormatError
from loramux.registry.errors import Corrupt, StorageError

log = logging.getLogger(__name__)

# Status of the codes that lower layers raise; a code that is not here is a bad request.
STATUS: Mapping[str, int] = {
    "invalid_api_key": 401,
    "permission_denied": 403,
    "model_not_found": 404,
    "not_found": 404,
    "conflict": 409,
    "precondition_failed": 412,
    "too_large": 413,
    "rate_limit_exceeded": 429,
    "quota_exceeded": 429,
    "overloaded": 503,
}
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    412: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
_HTTP_CODES: Mapping[int, str] = {
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "unsupported_media_type",
}
# Fields that take several types; a validator tells of the first of them only.
_SHAPES: Mapping[str, str] = {
    "prompt": "a text, token ids, or a list of either",
    "input": "a text or a list of texts",
    "stop": "a text or a list of texts",
    "content": "a text, or a list of parts of type 'text'",
}
_UNSUPPORTED: Mapping[str, str] = {
    "role": "turns of tools are not supported; allowed are 'system', 'developer', 'user' and 'assistant'",
    "content": "only parts of type 'text' are supported",
}
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_NO_OBJECT = ("model_attributes_type", "model_type", "dict_type")


class ApiError(LoramuxError):
    """An answer that is an error. `param` names the field of the body that is at fault."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.code, self.param = code, param
        self.status = status or STATUS.get(code, 400)
        self.headers = dict(headers or {})


def envelope(
    status: int, message: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: LoramuxError) -> ApiError:
    """What a lower layer's error is to a client. Errors without a code say what the user gave, never where it lies."""
    if isinstance(error, ApiError):
        return error
    hidden = _hidden(error)
    if hidden is not None:
        log.error("a client was told %r for: %s", hidden.code, error)
        return hidden
    code = str(error.code)  # type: ignore[attr-defined]
    headers = dict(getattr(error, "headers", None) or {})
    wait = getattr(error, "retry_after_s", None)
    if wait is not None:
        headers.setdefault("Retry-After", str(max(1, round(wait + 0.5))))
    status = getattr(error, "status", None)
    return ApiError(
        str(error), code=code, status=status if isinstance(status, int) else None,
        param=getattr(error, "param", None), headers=headers,
    )  # fmt: skip


def _hidden(error: LoramuxError) -> ApiError | None:
    """What stands for an error whose own text is the operator's: it may hold paths. None for all others."""
    if isinstance(error, EngineClosedError):
        return ApiError("the server is stopping", code="overloaded")
    if isinstance(error, StorageError):
        return ApiError("the registry cannot be reached; try again", code="storage", status=503)
    if isinstance(error, FormatError | Corrupt):
        return ApiError("the adapter cannot be read", code="adapter_unreadable", status=500)
    if not isinstance(getattr(error, "code", None), str):
        return ApiError("this cannot be done as asked", code="invalid_request")
    return None


def response_of(error: LoramuxError) -> JSONResponse:
    """The answer to a request that failed so."""
    found = as_api_error(error)
    body = envelope(found.status, str(found), found.code, found.param)
    headers = found.headers
    if found.status == 401:
        headers = {"WWW-Authenticate": "Bearer", **headers}
    return JSONResponse(body, found.status, headers)


def response_to(error: Exception) -> JSONResponse:
    """The answer to what a route, the framework or a lower layer raised on purpose."""
    if isinstance(error, RequestValidationError):
        return response_of(_validation(error))
    if isinstance(error, HTTPException):
        status = error.status_code
        code = _HTTP_CODES.get(status, "invalid_request")
        return JSONResponse(
            envelope(status, str(error.detail), code), status, dict(error.headers or {})
        )
    assert isinstance(error, LoramuxError)
    return response_of(error)


def install(app: FastAPI) -> None:
    """Let every way of failing answer with the envelope."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return response_to(error)

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # The trace goes to the log; what it says may hold paths or names that are not the caller's.
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(
            envelope(500, "the server failed; its log says why", "internal_error"), 500
        )

    for kind in (LoramuxError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(Exception, unexpected)


def _validation(error: RequestValidationError) -> ApiError:
    """The first problem, with its place. Of what was given a number beyond its bounds is repeated; all else may be a
    prompt."""
    errors = error.errors()
    # Of a field that takes several types each complains: what only one of them can say is the reason.
    first = next((each for each in errors if each["type"] == "value_error"), errors[0])
    place = [
        str(part)
        for part in first["loc"]
        # Also no name of a validator, which a union puts there.
        if part not in ("body", "query", "path", "header") and "function-" not in str(part)
    ]
    where = ".".join(place) or None
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden":
        return ApiError(
            f"unknown parameter {where!r}; remove it", code="unknown_parameter", param=where
        )
    if kind == "json_invalid":
        return ApiError("the body is not valid JSON", code="invalid_json")
    if kind == "missing":
        code, message = "missing_parameter", f"{where or 'the body'} is missing"
    elif where is None and kind in _NO_OBJECT:
        code = "invalid_value"
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    elif _is_unsupported(place, given):
        code, message = "unsupported_parameter", f"{where}: {_UNSUPPORTED[place[-1]]}"
    else:
        code, message = "invalid_value", f"{where or 'the body'}: {_reason(first, place)}"
    return ApiError(message, code=code, param=where)


def _reason(first: Any, place: list[str]) -> str:
    kind, given = first["type"], first.get("input")
    if kind == "string_type" and place and place[-1] in _SHAPES:
        return f"must be {_SHAPES[place[-1]]}"
    text = str(first["msg"]).removeprefix("Value error, ")
    if kind in _BOUNDS and isinstance(given, int | float):
        return f"{text}, got {given!r:.24}"
    return text


def _is_unsupported(place: list[str], given: Any) -> bool:
    """Turns of tools, and parts that are not text: right in OpenAI's words, and not what this server can do."""
    if place[:1] != ["messages"]:
        return False
    if place[-1] == "role":
        return given in ("tool", "function")
    if place[-1] != "content" or not isinstance(given, list):
        return False
    kinds = [part.get("type") for part in given if isinstance(part, Mapping)]
    return any(isinstance(kind, str) and kind != "text" for kind in kinds)
