"""A server for tests: over stubs through FastAPI's TestClient, or over a pico engine behind a real uvicorn."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from loramux.server.app import create_app
from loramux.server.config import ServerConfig, parse_config
from loramux.server.services import Services
from loramux.server.stub import StubEngine, StubRegistry, StubTokenizer

LOCAL = "http://127.0.0.1"  # a server without keys answers to no other name


def config(**values: Any) -> ServerConfig:
    return parse_config({"base": "pico", **values})


def stub_services(**parts: Any) -> Services:
    """Services over stubs; `registry` holds local/law and local/tone unless one is given."""
    if "registry" not in parts:
        parts["registry"] = StubRegistry()
        for name in ("law", "tone"):
            parts["registry"].add("local", name)
    return Services(
        **{"engine": StubEngine(), "tokenizer": StubTokenizer(), "max_length": 1000, **parts}
    )


def client(services: Services | None = None, **values: Any) -> TestClient:
    """A client of a server over these services; values are those of the configuration."""
    return TestClient(create_app(config(**values), services or stub_services()), base_url=LOCAL)


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which must be in the envelope."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The URL of a real server on a free port of this machine."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        assert not thread.is_alive()


class FolderRegistry(StubRegistry):
    """A stub whose versions have folders that a real engine can read."""

    def __init__(self) -> None:
        super().__init__()
        self.folders: dict[str, Any] = {}

    def add_folder(self, tenant: str, name: str, folder: Any, **fields: Any) -> Any:
        version = self.add(tenant, name, **fields)
        self.folders[version.digest] = folder
        return version

    def folder(self, version: Any) -> Any:
        return self.folders[version.digest]
