"""What the server costs beside the model: 10,000 registered adapters of 1,000 tenants, a stub in the engine's place.

    python -m loramux.bench.gateway --home DIR --rate 300 --seconds 60

Everything but the engine is real: keys, policy, quotas, names, the registry's folders, receipts, metrics, HTTP. The
server is one process, the clients another. Arrivals keep their times whatever the answers do (an open loop), so a slow
answer cannot hide the ones behind it; latency counts from when a request was due. The stub takes no time of its own, so
all of it is what the server adds.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.bench.gateway_http import quantile
from loramux.bench.gateway_server import in_process
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
                made_up = upload(staging, f"{tenant}/adapter-{a}")
                registry.publish(made_up, tenant=tenant, name=f"adapter-{a}", actor="bench")
    keys_file.write_text(json.dumps(secrets))
    return secrets


def upload(staging: Path, name: str) -> Upload:
    """Files that only the registry can tell apart; `staging` may be used again once they are published."""
    files = []
    for path in ("adapter_config.json", "adapter_model.safetensors"):
        body = f"{name} {path}".encode()
        (staging / path).write_bytes(body)
        files.append(Staged(path, hashlib.sha256(body).hexdigest(), len(body), staging / path))
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Upload(tuple(files), digest, sum(file.num_bytes for file in files))


# --- The clients' process ---------------------------------------------------------------------------


class Load:
    """An open loop over a few kept connections."""

    def __init__(self, port: int, secrets: list[str], each: int, seed: int):
        self.port, self.secrets, self.each = port, secrets, each
        self.draw = random.Random(seed)
        self.latencies: list[float] = []
        self.late: list[float] = []  # from when a call was due to when it was sent
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
            self.late.append(clock() - at)
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
    with in_process(home, CONFIG, stub=0.0) as served:
        load = Load(served.port, secrets, each, seed)
        before, began = served.cpu_s, time.perf_counter()
        asyncio.run(load.run(rate, seconds))
        took, cpu_s = time.perf_counter() - began, served.cpu_s - before
        resident = served.resident_bytes
    num = len(load.latencies)
    return {
        "adapters": tenants * each, "tenants": tenants, "rate": rate, "seconds": round(took, 1),
        "requests": num, "failed": load.failed, "served_per_s": round(num / took, 1),
        **{f"p{share}_ms": _ms(load.latencies, share) for share in (50, 95, 99, 100)},
        "late_p99_ms": _ms(load.late, 99),  # of that, what the client itself was late
        "start_s": served.start_s, "resident_mb": resident >> 20,
        "cpu_ms_per_request": round(1000 * cpu_s / num, 3), "cores_used": round(cpu_s / took, 2),
        "load_average": round(os.getloadavg()[0], 1), "seed": seed,
    }  # fmt: skip


def _ms(values: list[float], share: int) -> float:
    return round(1000 * quantile(values, share / 100), 2)


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
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    done = measure(args.home, args.rate, args.seconds, args.seed, args.tenants, args.each)
    sys.stdout.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
