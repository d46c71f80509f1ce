"""Whether the server lives, whether it takes requests, what it is; and its OpenAPI description."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

import loramux
from loramux.server.auth import ServicesDep
from loramux.server.errors import ApiError


def router() -> APIRouter:
    """GET /health /ready /version /openapi.json."""
    routes = APIRouter(tags=["health"])

    @routes.get("/health", summary="Whether the process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready", summary="Whether inference requests are taken now")
    async def ready(services: ServicesDep) -> dict[str, str]:
        gate = services.gate
        if gate.num_inflight >= gate.max_inflight:
            raise ApiError("the queue is full", code="overloaded", headers={"Retry-After": "1"})
        # An order to the engine's thread: it answers between two steps, and fails once a step has failed.
        try:
            await services.engine.call(lambda engine: None)
        except Exception:
            raise ApiError("the engine takes no requests", code="overloaded") from None
        return {"status": "ready"}

    @routes.get("/version", summary="What runs here")
    async def version(request: Request, services: ServicesDep) -> dict[str, Any]:
        return {
            "version": loramux.__version__,
            "base": request.app.state.config.name,
            "base_digest": services.base_digest,
        }

    @routes.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> dict[str, Any]:
        described: dict[str, Any] = request.app.openapi()
        return described

    return routes
