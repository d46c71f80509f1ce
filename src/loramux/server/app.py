"""The application: routes, errors, and what surrounds them. `create_app(config, services)` makes it.

Why services from outside: the same application runs over a real engine, a stub, one user or many tenants.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI

import loramux
from loramux.server import errors, observe
from loramux.server.asgi import Outer
from loramux.server.auth import authorise
from loramux.server.config import ServerConfig
from loramux.server.limits import Gate
from loramux.server.loaded import LoadedAdapters
from loramux.server.replies import Words
from loramux.server.resolve import Names
from loramux.server.services import Services
from loramux.tenancy.policy import check_routes
from loramux.tenancy.weights import Weights

# Each has `router() -> APIRouter`.
ROUTES = (
    "loramux.server.routes.chat",
    "loramux.server.routes.completions",
    "loramux.server.routes.embeddings",
    "loramux.server.routes.models",
    "loramux.server.routes.health",
    "loramux.server.adapters",
    "loramux.server.vllm",
    "loramux.server.metrics",
    "loramux.server.versions",
    "loramux.server.issuer",
)


def create_app(config: ServerConfig, services: Services) -> FastAPI:
    """The server as an ASGI application. At its end it shuts the engine down and closes the registry."""
    limits = config.limits
    services.gate = Gate(limits.max_inflight, limits.max_inflight_per_tenant)
    follower = services.extras.get("follower")
    services.names = Names(
        services.registry, limits.max_names, on_change=follower.sync if follower else None
    )
    if services.tenancy is not None:
        services.weights = Weights(services.engine)
    services.loaded = LoadedAdapters(
        services.engine,
        services.registry.folder if services.registry is not None else _no_adapters,
        limits.max_adapters,
    )
    app = FastAPI(
        title="loramux",
        version=loramux.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # a route of ours, so that the policy covers it
        dependencies=[Depends(authorise)],
        lifespan=_lifespan,
    )
    app.state.config, app.state.services = config, services
    app.state.words = Words(services.tokenizer)
    errors.install(app)
    for name in ROUTES:
        app.include_router(importlib.import_module(name).router())
    observe.install(app, config, services)
    app.add_middleware(
        Outer, services=services, body_bytes=limits.body_bytes, is_local=services.tenancy is None
    )
    check_routes(app)
    return app


def _no_adapters(version: object) -> None:
    raise AssertionError("a server without a registry has no adapters")


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    try:
        yield
    finally:
        await services.engine.shutdown(finish=False)
        for part in (services.registry, services.tenancy):
            close = getattr(part, "close", None)
            if close is not None:
                close()
