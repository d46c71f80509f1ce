"""How a server listens and how it stops: uvicorn's settings in one place, for `loramux serve` and for what measures it.

Why not uvicorn's own bound on connections: it answers without Retry-After and not in the API's envelope.
Why not its own end of a stop: it cancels what runs, so that streams break off and whole answers become a bare 500.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from loramux.server.config import LimitsConfig

BACKLOG = 2048  # connections that the system accepts while the server is busy
_SPARE_FILES = 256  # beside connections: database, adapters, logs
_LAST_S = 5  # for what calls that were ended still have to say


def uvicorn_config(app: Any, limits: LimitsConfig, **more: Any) -> Any:
    """A `uvicorn.Config` for what `create_app` made; `more` are further settings of it."""
    import uvicorn

    from loramux.server.connections import HARD, HEAD_BYTES, protocol_of

    _allow_files(HARD * limits.max_connections + _SPARE_FILES)
    return uvicorn.Config(
        app,
        http=protocol_of(limits, on_refusal=getattr(app.state, "refused", None)),
        ws="none",
        access_log=False,  # paths of adapters are not for every log
        server_header=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=HEAD_BYTES,
        **more,
    )


def server_of(config: Any, end_calls: Callable[[], Awaitable[Any]], grace_s: float) -> Any:
    """A `uvicorn.Server`. Told to stop, it gives calls under way `grace_s`; then `end_calls` ends them: they say so."""
    import uvicorn

    config.timeout_graceful_shutdown = grace_s + _LAST_S

    async def end_late() -> None:
        await asyncio.sleep(grace_s)
        await end_calls()

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending = asyncio.ensure_future(end_late())
            try:
                await super().shutdown(sockets)
            finally:
                ending.cancel()
                await asyncio.gather(ending, return_exceptions=True)

    return Server(config)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, else None: the standard one. As uvicorn chooses."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _allow_files(wanted: int) -> None:
    """Raise this process's bound on open files as far as it may."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
