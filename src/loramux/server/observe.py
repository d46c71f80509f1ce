"""Hangs metrics and tracing into an application: `install` is called once by `create_app`, and `count` after it.

Why two: tracing and observers belong within the outermost layer, counting around it, or its refusals would be missing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from loramux.server.config import ServerConfig
from loramux.server.issuer import Issuer
from loramux.server.labels import OTHER
from loramux.server.meters import Metrics
from loramux.server.metrics import KEY
from loramux.server.services import Services
from loramux.server.signing import Signer
from loramux.server.tracing import Tracing
from loramux.server.uploads import sweep
from loramux.tenancy.policy import POLICY

log = logging.getLogger(__name__)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
UNMATCHED = "unmatched"
_FIXED = frozenset(path for _, path in POLICY if "{" not in path)
CONNECTION = "connection"  # in a route's place: answered below the application
RECEIPTS = "receipts"  # folder of the signing key, in the data folder
TRACER_PROVIDER = "tracer_provider"  # of Services.extras; the global one without it


def install(app: FastAPI, config: ServerConfig, services: Services) -> None:
    """Metrics, tracing, and the leftovers of killed uploads."""
    if config.metrics.tracing:
        tracing = Tracing(services.extras.get(TRACER_PROVIDER))
        services.observers.append(tracing)
        app.add_middleware(_Wrapped, wrap=tracing.around)
    if config.metrics.enabled:
        metrics = Metrics(
            config.name, max_lora=config.engine.max_slots, top=config.metrics.top_adapters
        )
        services.extras[KEY] = metrics
        services.observers.append(metrics)
    gone = sweep(services.extras.get("staging"))
    if gone:
        log.info("%d unfinished uploads of an earlier run removed", gone)


def count(app: FastAPI, services: Services) -> None:
    """Count every response. After all other layers: what is added last is outermost."""
    metrics = services.extras.get(KEY)
    if not app.state.config.metrics.enabled or metrics is None:
        return
    app.add_middleware(_Counted, metrics=metrics)
    # What is answered below the application, `refused(status)`; see `uvicorn_config`.
    app.state.refused = partial(metrics.responded, OTHER, CONNECTION)


def open_issuer(config: ServerConfig, home: Path, base: str | None) -> Issuer | None:
    """The issuer of receipts, its key under `config.data` or else under `home`; None if there shall be none."""
    if not config.receipts.enabled:
        return None
    folder = Path(config.data).expanduser() if config.data is not None else home
    return Issuer(Signer.open(folder / RECEIPTS), base)


_Scope = MutableMapping[str, Any]
_Send = Callable[[_Scope], Awaitable[None]]


class _Wrapped:
    """A layer that somebody else makes."""

    def __init__(self, app: Any, wrap: Callable[[Any], Any]) -> None:
        self._app = wrap(app)

    async def __call__(self, scope: _Scope, receive: Any, send: _Send) -> None:
        await self._app(scope, receive, send)


class _Counted:
    """Counts responses by the template of their route: what was asked for may be anything.

    One refused before its route is looked up is counted under its path where that is a template, else as unmatched.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: _Scope, receive: Any, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: _Scope) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in METHODS else OTHER
                found = scope["path"] if scope["path"] in _FIXED else UNMATCHED
                route = str(getattr(scope.get("route"), "path", found))
                self._metrics.responded(method, route, message["status"])
            await send(message)

        await self._app(scope, receive, counted)
