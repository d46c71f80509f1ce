"""`loramux serve`: the HTTP server over the engine, from one YAML."""

from __future__ import annotations

import gc
import logging
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux.cli.output import STDOUT, emit
from loramux.errors import LoramuxError, require

if TYPE_CHECKING:
    from loramux.server.config import ServerConfig


def serve(
    file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to serve, and how.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as port=9000."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")
    ] = False,
) -> None:
    """Serve a base model and all registered adapters by OpenAI's API.

    Without tenants there are no keys, and the server listens on this machine only.

    Example: loramux serve serve.yaml --set port=9000
    """
    require("fastapi", "serve", "the server")
    require("uvicorn", "serve", "the server")
    from loramux.server.config import load_config

    config = load_config(file, set_ or ())
    if dry_run:
        emit(config.model_dump(mode="json"), STDOUT, lambda _: None)
        return
    _run(config)


def _run(config: ServerConfig) -> None:
    from loramux.server.app import create_app
    from loramux.server.build import build_services
    from loramux.server.listening import server_of, uvicorn_config

    log_with_times()
    # Before the base is read, which takes longest: a port that is taken is told at once.
    with _bound(config.host, config.port) as listener:
        services = build_services(config)
        app = create_app(config, services)
        for line in notice(config, listener.getsockname()[1]):
            print(line, flush=True)
        server = server_of(
            uvicorn_config(app, config.limits, log_level="warning"),
            lambda: services.engine.shutdown(finish=False),
            config.limits.grace_s,
        )
        # What is there now stays: a full collection would walk through all of it, a pause of a tenth of a second.
        gc.collect()
        gc.freeze()
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)


def log_with_times() -> None:
    """Lines of a process that runs for weeks say when, and how bad; those of other commands need not."""
    words = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=words, stream=sys.stderr, force=True)


def _bound(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet; port 0 is one that is free."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise LoramuxError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another host or port"
        ) from None
    return listener


def notice(config: ServerConfig, port: int) -> list[str]:
    """What the operator is told at the start; `port` is the one that was bound."""
    where = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}/v1"
    if config.tenants.enabled:
        keys = "every request needs a key: loramux key create"
    else:
        keys = f"no keys: whoever can reach {config.host} on this machine is the one user `local`"
    return [f"serving {config.name} at {where}", keys]


def schema() -> dict[str, Any]:
    """JSON Schema of the configuration, for editors."""
    from loramux.server.config import ServerConfig

    return ServerConfig.model_json_schema()
