"""The server that the other gateway checks load: in a process of its own, or in a thread of a test.

    python -m loramux.bench.gateway_server HOME --config '{"limits": {...}}' [--stub SECONDS_PER_TOKEN]

HOME has what `gateway_world.prepare` made: a base, adapters, a registry. With --stub everything is real but the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_S = 30.0
START_S = 120.0


@dataclass(frozen=True)
class Served:
    """A server that listens. `services`: its parts, where it runs in this process."""

    port: int
    pid: int
    start_s: float
    services: Any = None

    @property
    def resident_bytes(self) -> int:
        """Memory of its process."""
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_s(self) -> float:
        """Processor time that its threads have used so far, to the nanosecond where the kernel counts so."""
        used = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
                used += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        return used / 1e9

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def in_process(
    home: Path, config: Mapping[str, Any] | None = None, stub: float | None = None
) -> Iterator[Served]:
    """Start it, wait until it listens, end it."""
    command = [
        *(sys.executable, "-m", "loramux.bench.gateway_server", str(home)),
        *("--config", json.dumps(dict(config or {}))),
        *(() if stub is None else ("--stub", str(stub))),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start; it ended with {process.wait()}")
            yield Served(pid=process.pid, **json.loads(line))
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def in_thread(
    home: Path, config: Mapping[str, Any] | None = None, stub: float | None = None
) -> Iterator[Served]:
    """The same within this process: it starts faster, and its parts can be looked at."""
    started, ended = threading.Event(), threading.Event()
    found: list[Served] = []
    failed: list[BaseException] = []

    async def run() -> None:
        async with _serving(home, dict(config or {}), stub) as served:
            found.append(served)
            started.set()
            while not ended.is_set():
                await asyncio.sleep(0.01)

    def work() -> None:
        try:
            _run(run)
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        started.wait(START_S)
        if failed or not found:
            raise RuntimeError("the server did not start") from next(iter(failed), None)
        yield found[0]
    finally:
        ended.set()
        thread.join(STOP_S)
    if failed:
        raise RuntimeError("the server failed") from failed[0]


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On the loop that `loramux serve` runs on."""
    from loramux.server.listening import loop_factory

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(work())


class _serving:
    """uvicorn over the application, for as long as the block lasts."""

    def __init__(self, home: Path, config: dict[str, Any], stub: float | None):
        self.home, self.config, self.stub = home, config, stub

    async def __aenter__(self) -> Served:
        began = time.perf_counter()
        import uvicorn

        from loramux.server.app import create_app
        from loramux.server.listening import uvicorn_config

        settings, services = _build(self.home, self.config, self.stub)
        app = create_app(settings, services)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        # As `loramux serve` has it, but for signals: the caller ends it.
        self.server = uvicorn.Server(
            uvicorn_config(app, settings.limits, log_level="error", timeout_graceful_shutdown=5)
        )
        self.task = asyncio.ensure_future(self.server._serve([listener]))
        while not self.server.started and not self.task.done():
            await asyncio.sleep(0.005)
        if self.task.done():
            self.task.result()
        return Served(port, os.getpid(), round(time.perf_counter() - began, 3), services)

    async def __aexit__(self, *_: object) -> None:
        self.server.should_exit = True
        await self.task


def _build(home: Path, config: dict[str, Any], stub: float | None) -> tuple[Any, Any]:
    from loramux.server.config import parse_config

    given = {"retrieval": {"enabled": False}, **config}
    settings = parse_config(
        {
            "base": str(home / "base"), "model_name": "base-model", "data": str(home / "data"),
            "registry": {"root": str(home / "registry")}, **given,
        }
    )  # fmt: skip
    if stub is None:
        from loramux.server.build import build_services

        return settings, build_services(settings)
    from loramux.registry import Registry
    from loramux.registry.checks import base_shape
    from loramux.server.observe import open_issuer
    from loramux.server.services import Services
    from loramux.server.stub import StubEngine, StubTokenizer
    from loramux.tenancy import Tenancy

    registry = Registry.open(home / "registry")
    return settings, Services(
        engine=StubEngine(stub), tokenizer=StubTokenizer(), max_length=4096, registry=registry,
        tenancy=Tenancy.open(registry.database, asks_beside=True) if settings.tenants.enabled else None,
        signer=open_issuer(settings, home / "data", None),
        base=base_shape(home / "base") if (home / "base").is_dir() else None,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--stub", type=float, help="seconds per token of a stub of the engine")
    given = parser.parse_args()

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with _serving(given.home, given.config, given.stub) as served:
            said = {"port": served.port, "start_s": served.start_s}
            gc.collect()
            gc.freeze()  # as `loramux serve`
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
            await stop.wait()

    _run(run)


if __name__ == "__main__":
    main()
