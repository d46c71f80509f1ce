"""A key that is revoked here is refused by a server in another process within a second.

    python -m loramux.bench.gateway_revoke --keys 20

This process revokes in the database, as `loramux key revoke` does; the server, another process, is asked with that key
without pause, beside other calls that go on. The time runs from when the revocation is committed to the first refusal;
after it no call may be let in again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.bench.gateway_http import ask
from loramux.bench.gateway_server import Served, in_process
from loramux.bench.gateway_world import ACTOR, add_tenants

WITHIN_S = 1.0
AFTER = 20  # calls after the first refusal
CONFIG = {"base": "stub", "tenants": {"enabled": True}}
BODY = {"model": "base", "prompt": "hello", "max_tokens": 2}


@dataclass
class Revoked:
    """Seconds until the first refusal, per key."""

    took_s: list[float] = field(default_factory=list)
    calls: int = 0
    others: int = 0
    problems: list[str] = field(default_factory=list)


async def run(served: Served, tenancy: Any, keys: int) -> Revoked:
    found = Revoked()
    tenants = [f"acme-{i}" for i in range(keys)]
    secrets = add_tenants(tenancy, [*tenants, "other"])
    other = asyncio.ensure_future(_go_on(served.port, secrets["other"], found))
    try:
        for tenant in tenants:
            await _one(served.port, tenancy, tenant, secrets[tenant], found)
    finally:
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
    return found


async def _one(port: int, tenancy: Any, tenant: str, secret: str, found: Revoked) -> None:
    while (
        await ask(port, BODY, key=secret)
    ).status != 200:  # the server learns of new keys as late
        await asyncio.sleep(0.02)
    (key,) = tenancy.keys.list(tenant)
    await asyncio.to_thread(tenancy.keys.revoke, key.id, actor=ACTOR)
    revoked = time.perf_counter()
    while (reply := await ask(port, BODY, key=secret)).status == 200:
        found.calls += 1
        if time.perf_counter() - revoked > 5 * WITHIN_S:
            break
    found.took_s.append(round(time.perf_counter() - revoked, 3))
    if found.took_s[-1] > WITHIN_S:
        found.problems.append(f"{tenant}: let in for {found.took_s[-1]} s")
    if reply.status != 401 or reply.json()["error"]["code"] != "invalid_api_key":
        found.problems.append(f"{tenant}: refused with {reply.status} {reply.body[:200]!r}")
    for _ in range(AFTER):
        if (await ask(port, BODY, key=secret)).status != 401:
            found.problems.append(f"{tenant}: let in again")


async def _go_on(port: int, secret: str, found: Revoked) -> None:
    """Another tenant's calls, which must not notice."""
    is_known = False
    while True:
        status = (await ask(port, BODY, key=secret)).status
        is_known = is_known or status == 200
        found.others += status == 200
        if is_known and status != 200:
            found.problems.append(f"another tenant got {status}")
        await asyncio.sleep(0.01)


def main() -> int:
    from loramux.registry import Registry
    from loramux.tenancy import Tenancy

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-revoke-") as folder:
        home = Path(folder)
        with (
            Registry.open(home / "registry") as registry,
            Tenancy.open(registry.database) as tenancy,
            in_process(home, CONFIG, stub=0.0) as served,
        ):
            found = asyncio.run(run(served, tenancy, given.keys))
    said = {**vars(found), "most_s": max(found.took_s)}
    sys.stdout.write(json.dumps(said) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
