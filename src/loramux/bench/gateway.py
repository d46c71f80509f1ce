"""What the server costs beside the model: 10,000 registered adapters of 1,000 tenants, a stub in the engine's place.

    python -m loramux.bench.gateway --home DIR --rate 300 --seconds 60

Everything but the engine is real: keys, policy, quotas, names, the registry's folders, receipts, metrics, HTTP. The
server is one process, the clients another. Arrivals keep their times whatever the answers do (an open loop), so a slow
answer cannot hide the ones behind it; latency counts from when a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.server.stub import BASE_DIGEST

TENANTS, EACH = 1000, 10
CLIENTS = 64
CONFIG = {"base": "stub", "tenants": {"enabled": True}, "retrieval": {"enabled": False}}


@dataclass(frozen=True)
class Staged:
    """A file as publishing reads it."""

    path: str
    sha256: str
    num_bytes: int
    staged: Path


@dataclass(frozen=True)
class Upload:
    """A tiny upload, as if it had passed the checks."""

    files: tuple[Staged, ...]
    digest: str
    num_bytes: int
    base_digest: str | None = BASE_DIGEST
    method: str = "lora"
    servability: str = "static"
    max_rank: int = 8


def fill(home: Path, tenants: int, each: int) -> list[str]:
    """A registry of tenants x each adapters, and a key of each tenant; kept between runs."""
    from loramux.registry import Registry
    from loramux.tenancy import Tenancy
    from loramux.tenancy.caller import Limits

    keys_file = home / f"keys-{tenants}-{each}.json"
    if keys_file.exists():
        kept: list[str] = json.loads(keys_file.read_text())
        return kept
    staging = home / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    secrets = []
    with Registry.open(home / "registry") as registry, Tenancy.open(registry.database) as tenancy:
        for t in range(tenants):
            tenant = f"tenant-{t}"
            tenancy.tenants.create(tenant, limits=Limits.none(), actor="bench")
            made = tenancy.keys.create(tenant, scopes=["infer"], actor="bench")
            secrets.append(made.secret)
            for a in range(each):
                upload = _upload(staging, f"{tenant}/adapter-{a}")
                registry.publish(upload, tenant=tenant, name=f"adapter-{a}", actor="bench")
    keys_file.write_text(json.dumps(secrets))
    return secrets


def _upload(staging: Path, name: str) -> Upload:
    files = []
    for path in ("adapter_config.json", "adapter_model.safetensors"):
        body = f"{name} {path}".encode()
        (staging / path).write_bytes(body)
        files.append(Staged(path, hashlib.sha256(body).hexdigest(), len(body), staging / path))
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Upload(tuple(files), digest, sum(file.num_bytes for file in files))


# --- The server's process ---------------------------------------------------------------------------


def serve(home: Path, port: int) -> None:
    """Says on standard output how long it took to start, then serves until it is ended."""
    began = time.perf_counter()
    import uvicorn

    from loramux.registry import Registry
    from loramux.server.app import create_app
    from loramux.server.config import parse_config
    from loramux.server.issuer import Issuer
    from loramux.server.services import Services
    from loramux.server.signing import Signer
    from loramux.server.stub import StubEngine, StubTokenizer
    from loramux.tenancy import Tenancy

    registry = Registry.open(home / "registry")
    services = Services(
        engine=StubEngine(), registry=registry, tokenizer=StubTokenizer(), max_length=4096,
        tenancy=Tenancy.open(registry.database), signer=Issuer(Signer.open(home / "signing")),
    )  # fmt: skip
    app = create_app(parse_config(CONFIG), services)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", access_log=False))

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        sys.stdout.write(json.dumps({"start_s": round(time.perf_counter() - began, 3)}) + "\n")
        sys.stdout.flush()
        await serving

    asyncio.run(run())


# --- The clients' process ---------------------------------------------------------------------------


class Load:
    """An open loop over a few kept connections."""

    def __init__(self, port: int, secrets: list[str], each: int, seed: int):
        self.port, self.secrets, self.each = port, secrets, each
        self.draw = random.Random(seed)
        self.latencies: list[float] = []
        self.failed = 0

    def body(self) -> bytes:
        t = self.draw.randrange(len(self.secrets))
        said = {
            "model": f"adapter-{self.draw.randrange(self.each)}",
            "prompt": "hello there",
            "max_tokens": 8,
        }
        data = json.dumps(said).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.secrets[t]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def run(self, rate: float, seconds: float) -> None:
        due: asyncio.Queue[float | None] = asyncio.Queue()
        workers = [asyncio.ensure_future(self._worker(due)) for _ in range(CLIENTS)]
        clock = asyncio.get_running_loop().time
        start = clock()
        for place in range(int(rate * seconds)):
            at = start + place / rate
            if at > clock():
                await asyncio.sleep(at - clock())
            due.put_nowait(at)
        for _ in workers:
            due.put_nowait(None)
        await asyncio.gather(*workers)

    async def _worker(self, due: asyncio.Queue[float | None]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        clock = asyncio.get_running_loop().time
        while (at := await due.get()) is not None:
            writer.write(self.body())
            status = await self._answer(reader)
            self.latencies.append(clock() - at)
            self.failed += status != 200
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> int:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        lower = head.lower()
        start = lower.index(b"content-length:") + 15
        await reader.readexactly(int(lower[start : lower.index(b"\r\n", start)]))
        return status


def measure(
    home: Path, rate: float, seconds: float, seed: int, tenants: int, each: int
) -> dict[str, Any]:
    """One run: start the server, warm nothing, load it, end it."""
    secrets = fill(home, tenants, each)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "loramux.bench.gateway",
        "--home",
        str(home),
        "--serve",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        started = json.loads(server.stdout.readline())
        load = Load(port, secrets, each, seed)
        began = time.perf_counter()
        asyncio.run(load.run(rate, seconds))
        took = time.perf_counter() - began
    finally:
        server.terminate()
        server.wait(timeout=30)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime
    times = sorted(load.latencies)

    def at(share: float) -> float:
        return round(1000 * times[min(len(times) - 1, int(share * len(times)))], 2)

    return {
        "adapters": tenants * each, "tenants": tenants, "rate": rate, "seconds": round(took, 1),
        "requests": len(times), "failed": load.failed, "served_per_s": round(len(times) / took, 1),
        "p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99), "max_ms": round(1000 * times[-1], 2),
        **started, "rss_mb": used.ru_maxrss // 1024,
        "cpu_ms_per_request": round(1000 * cpu_s / len(times), 3),  # the start included
        "load_average": round(os.getloadavg()[0], 1), "seed": seed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--home", type=Path, required=True, help="kept between runs: the filled registry"
    )
    parser.add_argument("--rate", type=float, default=300)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tenants", type=int, default=TENANTS)
    parser.add_argument("--each", type=int, default=EACH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.home, args.serve)
        return
    args.home.mkdir(parents=True, exist_ok=True)
    done = measure(args.home, args.rate, args.seconds, args.seed, args.tenants, args.each)
    sys.stdout.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
