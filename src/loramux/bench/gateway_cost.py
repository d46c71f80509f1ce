"""Processor time that the application takes per call, HTTP parsing and sockets excluded: for machines that others use.

    python -m loramux.bench.gateway_cost --home DIR

Where `gateway` needs a free machine, this needs patience: calls go into the application one at a time, in batches, and
the cheapest batch counts, as the one that was disturbed least. *known*: an adapter that was asked for before; *new*:
one that has to be looked up, verified and given to the engine; *refused*: a tenant without room; *chunk*: one token of
a stream. The stub of the engine is in all of them but *refused*.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from loramux.bench.gateway import CONFIG, fill

TENANTS, EACH, CALLS = 20, 10, 50
STREAMED = 8  # tokens; the stub has no more to say
REFUSED = "no-room"


class Costs:
    """One application over a filled registry."""

    def __init__(self, home: Path) -> None:
        from loramux.registry import Registry
        from loramux.server.app import create_app
        from loramux.server.config import parse_config
        from loramux.server.issuer import Issuer
        from loramux.server.services import Services
        from loramux.server.signing import Signer
        from loramux.server.stub import StubEngine, StubTokenizer
        from loramux.tenancy import Tenancy

        self.secrets = fill(home, TENANTS, EACH)
        registry = Registry.open(home / "registry")
        self.engine = StubEngine()
        self.services = Services(
            engine=self.engine, tokenizer=StubTokenizer(), max_length=4096, registry=registry,
            tenancy=Tenancy.open(registry.database), signer=Issuer(Signer.open(home / "signing")),
        )  # fmt: skip
        self.app = create_app(parse_config(CONFIG), self.services)
        self.refused = self._refused()

    def close(self) -> None:
        self.services.registry.close()

    def _refused(self) -> str:
        """A key of a tenant that may do nothing at a time."""
        from loramux.tenancy.caller import Limits

        tenancy = self.services.tenancy
        if REFUSED not in {tenant.name for tenant in tenancy.tenants.list()}:
            tenancy.tenants.create(REFUSED, limits=Limits(max_concurrency=0), actor="bench")
        return str(tenancy.keys.create(REFUSED, scopes=["infer"], actor="bench").secret)

    async def call(self, secret: str, status: int = 200, **more: Any) -> None:
        said = {"model": "base", "prompt": "hello there", "max_tokens": STREAMED, **more}
        data = json.dumps(said).encode()
        first = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return first.pop() if first else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message.get("status", status) != status:
                raise RuntimeError(f"answered with {message['status']}, not {status}")

        headers = {
            "host": "127.0.0.1", "content-type": "application/json",
            "content-length": str(len(data)), "authorization": f"Bearer {secret}",
        }  # fmt: skip
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "raw_path": b"/v1/completions", "root_path": "", "scheme": "http", "http_version": "1.1",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "asgi": {"version": "3.0"},
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        await self.app(scope, receive, send)

    async def known(self, calls: int) -> None:
        for number in range(calls):
            await self.call(self.secrets[number % TENANTS], model=f"adapter-{number % EACH}")

    def forget(self) -> None:
        """Nothing was ever asked for."""
        self.services.names.forget()
        for digest in list(self.engine.folders):
            self.services.loaded._entries.pop(digest)
            self.engine.remove_adapter(digest)

    async def new(self, calls: int) -> None:
        places = random.Random(0).sample(range(TENANTS * EACH), calls)
        for place in places:
            await self.call(self.secrets[place // EACH], model=f"adapter-{place % EACH}")

    async def refuse(self, calls: int) -> None:
        for _ in range(calls):
            await self.call(self.refused, 429)

    async def stream(self, calls: int, tokens: int) -> None:
        for _ in range(calls):
            await self.call(self.secrets[0], model="adapter-0", stream=True, max_tokens=tokens)


async def measure(costs: Costs, rounds: int, calls: int = CALLS) -> dict[str, float]:
    """Milliseconds of a call of each kind; the kinds take turns, so that a busy minute meets them all."""
    best: dict[str, float] = {}

    async def timed(kind: str, work: Callable[[], Awaitable[None]]) -> None:
        began = time.process_time()
        await work()
        took = 1000 * (time.process_time() - began) / calls
        best[kind] = min(took, best.get(kind, took))

    await costs.new(calls)  # makes the folders
    for _ in range(rounds):
        costs.forget()
        await timed("new", lambda: costs.new(calls))
        await costs.known(calls)
        await timed("known", lambda: costs.known(calls))
        await timed("refused", lambda: costs.refuse(calls))
        await timed("stream", lambda: costs.stream(calls, STREAMED))
        await timed("first", lambda: costs.stream(calls, 1))
    chunk = (best.pop("stream") - best.pop("first")) / (STREAMED - 1)
    return {kind: round(took, 3) for kind, took in {**best, "chunk": chunk}.items()}


def main() -> None:
    from loramux.server.listening import loop_factory

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="kept between runs")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    given.home.mkdir(parents=True, exist_ok=True)
    costs = Costs(given.home)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        found = runner.run(measure(costs, given.rounds))
    costs.close()
    said = {
        "ms_per_call": found, "rounds": given.rounds, "calls": CALLS,
        "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
