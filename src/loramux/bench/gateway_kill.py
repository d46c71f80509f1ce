"""SIGKILL of the server while adapters are uploaded: the registry is whole, and the server starts again.

    python -m loramux.bench.gateway_kill --kills 40

The server is real but for the engine. Clients upload without pause; at a random moment the process is killed. Then
`fsck` finds nothing torn, every upload that was acknowledged is there with the digest that was told, and the server,
started again over the same folders, takes an upload and answers with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.bench.gateway_http import Reply, ask, get
from loramux.bench.gateway_server import Served, in_process
from loramux.bench.gateway_world import LOCAL, World, prepare
from loramux.bench.markers import FILES

CONTENTS, CLIENTS, NAMES = 12, 2, 4  # a tenant may have two uploads under way
LATEST_KILL_S = 0.6
BOUNDARY = "loramux-gateway-kill"
CONFIG = {"base": "stub", "limits": {"max_inflight": 64}}


@dataclass
class Kills:
    """`acknowledged`: uploads that were answered; `cut`: calls that the kill broke off."""

    kills: int = 0
    acknowledged: int = 0
    cut: int = 0
    with_leftovers: int = 0
    starts_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Killing:
    """Kills and restarts over one home."""

    def __init__(self, world: World, seed: int = 0):
        self.world, self.draw, self.found = world, random.Random(seed), Kills()
        self.bodies = [_form(folder) for folder in world.folders]
        self.told: dict[str, str] = {}  # reference -> digest, of what was acknowledged
        self.sent: Counter[str] = Counter()

    def run(self, kills: int) -> Kills:
        for _ in range(kills):
            with ExitStack() as stack:
                served = stack.enter_context(in_process(self.world.home, CONFIG, stub=0.0))
                self.found.starts_s.append(served.start_s)
                asyncio.run(self._round(served))
            self.found.kills += 1
            self._look()
        with in_process(self.world.home, CONFIG, stub=0.0) as served:
            asyncio.run(self._still_works(served))
        return self.found

    async def _round(self, served: Served) -> None:
        await self._still_works(served)
        clients = [asyncio.ensure_future(self._upload_on(served.port)) for _ in range(CLIENTS)]
        await asyncio.sleep(self.draw.uniform(0.0, LATEST_KILL_S))
        served.kill()
        await asyncio.gather(*clients)

    async def _upload_on(self, port: int) -> None:
        while True:
            try:
                reply = await self._upload(port, f"name-{self.draw.randrange(NAMES)}")
            except (OSError, asyncio.IncompleteReadError):
                self.found.cut += 1
                return
            if reply.status not in (200, 201):
                self.found.problems.append(f"an upload gave {reply.status}: {reply.body[:200]!r}")

    async def _upload(self, port: int, name: str) -> Reply:
        form = self.draw.choice(self.bodies)
        field_of_name = _field("name", name)
        reply = await ask(
            port, field_of_name + form, path="/v1/adapters",
            headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
        )  # fmt: skip
        if reply.status in (200, 201):
            said = reply.json()
            self.told[said["ref"]] = said["digest"]
            self.found.acknowledged += 1
        return reply

    async def _still_works(self, served: Served) -> None:
        """An upload, and a call that it answers."""
        reply = await self._upload(served.port, "after")
        if reply.status not in (200, 201):
            self.found.problems.append(
                f"after a start an upload gave {reply.status}: {reply.body[:200]!r}"
            )
            return
        digest = reply.json()["digest"]
        body = {"model": "after", "prompt": "w1", "max_tokens": 8}
        answer = await ask(served.port, body)
        if answer.status != 200 or digest[:8] != answer.json()["choices"][0]["text"]:
            self.found.problems.append(
                f"after a start a call gave {answer.status}: {answer.body[:200]!r}"
            )
        if (await get(served.port, "/ready")).status != 200:
            self.found.problems.append("after a start the server is not ready")

    def _look(self) -> None:
        from loramux.registry import Registry

        with Registry.open(self.world.home / "registry") as registry:
            report = registry.fsck(grace_s=0)
            self.found.with_leftovers += bool(report.has_leftovers)
            if not report.is_clean:
                self.found.problems.append(f"kill {self.found.kills}: {report.as_dict()}")
            for ref, digest in self.told.items():
                if registry.resolve(ref, caller=LOCAL).digest != digest:
                    self.found.problems.append(f"{ref} is not what was acknowledged")
            if self.told:
                registry.folder(registry.resolve(self.draw.choice(list(self.told)), caller=LOCAL))


def _field(name: str, value: str, filename: str | None = None) -> bytes:
    what = f'form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
    return f"--{BOUNDARY}\r\nContent-Disposition: {what}\r\n\r\n{value}\r\n".encode()


def _form(folder: Path) -> bytes:
    """The files of an upload, and the end of the form."""
    parts = []
    for name in FILES:
        head = _field("files", "", name)
        parts.append(head.removesuffix(b"\r\n") + (folder / name).read_bytes() + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10_000))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-kill-") as folder:
        killing = Killing(prepare(Path(folder), CONTENTS), given.seed)
        found = killing.run(given.kills)
    said: dict[str, Any] = {
        **vars(found),
        "slowest_start_s": max(found.starts_s),
        "seed": given.seed,
    }
    del said["starts_s"]
    sys.stdout.write(json.dumps(said) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
