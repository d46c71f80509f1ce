"""The OpenAPI description: what FastAPI derives, with the errors that the routes really give and the key they want."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from loramux.server.auth import METRICS
from loramux.server.shapes import MEANINGS, SUCCESSES, errors_of
from loramux.tenancy.policy import PUBLIC, rule_of

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                # A number only from the two calls that answer as vLLM does.
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_UNUSED = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI, *, has_keys: bool) -> None:
    """Let `app.openapi()` tell the truth; computed once, when first asked for."""
    derived = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(derived(), has_keys)
            if has_keys and app.state.config.metrics.public:  # with a key or without one
                page = app.openapi_schema["paths"][METRICS]["get"]
                page["security"] = [{}, {"key": []}]
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _corrected(schema: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    parts = schema.setdefault("components", {})
    shapes = parts.setdefault("schemas", {})
    for name in _UNUSED:
        shapes.pop(name, None)
    shapes["Error"] = ERROR
    for path, operations in schema.get("paths", {}).items():
        for verb, operation in operations.items():
            # The description writes {model} where the route has {model:path}.
            rule = rule_of(verb.upper(), path.replace("{model}", "{model:path}"))
            is_public = rule is not None and rule.scope == PUBLIC
            failures = errors_of(
                verb, path, needs_key=has_keys and not is_public, is_local=not has_keys
            )
            _describe_answers(verb, path, operation["responses"], failures)
            if has_keys and is_public:
                operation["security"] = []
    if has_keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


def _describe_answers(verb: str, path: str, answers: dict[str, Any], failures: list[int]) -> None:
    answers.pop("422", None)  # FastAPI's own form, which never leaves us
    for status, shape in SUCCESSES.get((verb, path), {}).items():
        said = answers.setdefault(status, {"description": MEANINGS[int(status)]})
        if said["description"] == "Successful Response":
            said["description"] = "Done"
        said.setdefault("content", {})["application/json"] = {"schema": shape}
    reference = {"schema": {"$ref": "#/components/schemas/Error"}}
    for failure in failures:
        answers[str(failure)] = {
            "description": MEANINGS[failure],
            "content": {"application/json": reference},
        }
