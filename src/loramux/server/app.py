"""The application: routes, errors, and what surrounds them. `create_app(config, services)` makes it.

Why services from outside: the same application runs over a real engine, a stub, one user or many tenants.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI

import loramux
from loramux.server import errors, observe
from loramux.server.asgi import Outer
from loramux.server.auth import authorise
from loramux.server.config import ServerConfig
from loramux.server.express import Express
from loramux.server.limits import Gate
from loramux.server.loaded import LoadedAdapters
from loramux.server.replies import Words
from loramux.server.resolve import Names
from loramux.server.routes import chat, completions
from loramux.server.schema import describe
from loramux.server.services import Services
from loramux.tenancy.policy import check_routes
from loramux.tenancy.weights import Weights

log = logging.getLogger(__name__)
FLUSH_S = 10.0

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
    app.add_middleware(Express, lanes=(chat.LANE, completions.LANE), services=services)
    observe.install(app, config, services)
    app.add_middleware(Outer, services=services, limits=limits, is_local=services.tenancy is None)
    observe.count(app, services)
    check_routes(app)
    describe(app, has_keys=services.tenancy is not None)
    return app


def _no_adapters(version: object) -> None:
    raise AssertionError("a server without a registry has no adapters")


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    flushing = asyncio.ensure_future(_flush(services.tenancy))
    try:
        yield
    finally:
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
        async with contextlib.AsyncExitStack() as closing:  # whatever fails, the rest is closed
            # The tenants' ledger is written into the registry's database.
            for part in (services.registry, services.tenancy):
                close = getattr(part, "close", None)
                if close is not None:
                    closing.push_async_callback(asyncio.to_thread, close)
            await services.engine.shutdown(finish=False)


async def _flush(tenancy: Any) -> None:
    """Write the ledger now and then: a killed process loses FLUSH_S of it."""
    while tenancy is not None:
        await asyncio.sleep(FLUSH_S)
        try:
            await asyncio.to_thread(tenancy.flush)
        except Exception:
            log.exception("the ledger could not be written; it is tried again")
