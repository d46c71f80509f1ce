"""The OpenAPI description: what FastAPI derives, with the errors that the routes really give and the key they want."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

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
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _corrected(schema: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    parts = schema.setdefault("components", {})
    shapes = parts.setdefault("schemas", {})
    for name in _UNUSED:
        shapes.pop(name, None)
    shapes["Error"] = ERROR
    failure = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for operations in schema.get("paths", {}).values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own form, which never leaves us
            operation["responses"]["default"] = failure
    if has_keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema
