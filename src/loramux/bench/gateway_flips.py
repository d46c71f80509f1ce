"""Aliases that move while they are asked for: no call fails, no answer is mixed, receipts say what was pinned.

    python -m loramux.bench.gateway_flips --flips 200

A real engine behind the real server, on a tiny base whose adapters each say a word of their own. Clients ask for
`NAME@live` without pause, whole and streamed; another one moves `live` by compare-and-swap. Of every answer: all its
words belong to one content; that content is the one that the receipt names, and the reply's `model`; `live` led there
at some moment between the question and its answer; and the receipt's signature holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.bench.gateway_http import ask, get, open_call
from loramux.bench.gateway_server import Served, in_process
from loramux.bench.gateway_world import ACTOR, LOCAL, World, prepare, word
from loramux.server.receipts import parse, verify
from loramux.server.signing import PublicKeys

NAMES, VERSIONS, ALIAS = ("law", "tone", "code"), 4, "live"
MAX_PROBLEMS = 20
CONFIG = {"engine": {"kv_memory": "16MiB", "threads": 1}}


@dataclass
class Flips:
    """`problems` must stay empty."""

    flips: int = 0
    answers: int = 0
    streamed: int = 0
    failed: int = 0
    during_a_flip: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.failed += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)


@dataclass(frozen=True)
class Led:
    """`live` of a name may have led here from `since` on (a move was asked for), until `until` (the next was over)."""

    version: int
    since: float


def publish_all(world: World, registry: Any) -> dict[str, int]:
    """Every version of every name; returns digest -> content."""
    found = {}
    for place, name in enumerate(NAMES):
        for version in range(VERSIONS):
            content = place * VERSIONS + version
            found[world.publish(registry, content, name).digest] = content
        registry.set_alias(f"{LOCAL}/{name}", ALIAS, 1, actor=ACTOR)
    return found


class Flipping:
    """One run against a served world."""

    def __init__(self, served: Served, contents: dict[str, int], seed: int = 0):
        self.port, self.contents = served.port, contents
        self.draw = random.Random(seed)
        self.found = Flips()
        self.led = {name: [Led(1, 0.0)] for name in NAMES}
        self.over: dict[str, list[float]] = {name: [] for name in NAMES}  # when each move was over
        self.is_flipping = True

    async def run(self, flips: int, clients: int, pause_s: float) -> Flips:
        self.keys = PublicKeys.from_json((await get(self.port, "/v1/receipts/key")).json())
        asking = [asyncio.ensure_future(self._ask_on(i)) for i in range(clients)]
        try:
            for _ in range(flips):
                await self._flip(self.draw.choice(NAMES))
                await asyncio.sleep(self.draw.uniform(0, 2 * pause_s))
        finally:
            self.is_flipping = False
            await asyncio.gather(*asking)
        return self.found

    async def _flip(self, name: str) -> None:
        now = self.led[name][-1].version
        wanted = self.draw.choice([v for v in range(1, VERSIONS + 1) if v != now])
        self.led[name].append(Led(wanted, time.perf_counter()))
        reply = await ask(
            self.port, {"version": wanted}, method="PUT",
            path=f"/v1/adapters/{name}/aliases/{ALIAS}", headers={"If-Match": f'"{now}"'},
        )  # fmt: skip
        self.over[name].append(time.perf_counter())
        self.found.flips += 1
        if reply.status != 200:
            self.found.problem(f"a move gave {reply.status}: {reply.body[:200]!r}")

    async def _ask_on(self, number: int) -> None:
        draw = random.Random(f"{number} asks")
        while self.is_flipping:
            await self._ask(draw, draw.choice(NAMES))

    async def ask_once(self, name: str) -> Flips:
        """One call, judged."""
        self.keys = PublicKeys.from_json((await get(self.port, "/v1/receipts/key")).json())
        await self._ask(self.draw, name)
        return self.found

    async def _ask(self, draw: random.Random, name: str) -> None:
        body = {
            "model": f"{name}@{ALIAS}",
            "prompt": " ".join(f"w{draw.randrange(64)}" for _ in range(draw.randint(2, 24))),
            "max_tokens": draw.randint(2, 12),
            "temperature": 0,
            "stream": draw.random() < 0.5,
        }
        asked = time.perf_counter()
        async with open_call(self.port, body) as answer:
            if answer.status != 200:
                self.found.problem(f"a call gave {answer.status}: {(await answer.body())[:200]!r}")
                return
            text, said = await _read(answer, bool(body["stream"]))
        self.found.answers += 1
        self.found.streamed += bool(body["stream"])
        self._judge(name, text, said, asked, time.perf_counter())

    def _judge(self, name: str, text: str, said: dict[str, Any], asked: float, over: float) -> None:
        words = set(text.split())
        receipt = parse(said["loramux"]["receipt"])
        verify(receipt, self.keys)
        (part,) = receipt.answers[0]["parts"]
        version = int(part["ref"].rpartition("@")[2])
        expected = word(self.contents[part["digest"]])
        if words != {expected}:
            self.found.problem(
                f"{name}: says {sorted(words)}, the receipt names {part['ref']} ({expected})"
            )
        if said["model"] != part["ref"] or receipt.body["model"] != part["ref"]:
            self.found.problem(
                f"{name}: the reply names {said['model']}, the receipt {part['ref']}"
            )
        if part["ref"].partition("@")[0] != f"{LOCAL}/{name}" or part["content"] is None:
            self.found.problem(f"{name}: the receipt names {part}")
        allowed = self._allowed(name, asked, over)
        self.found.during_a_flip += len(allowed) > 1
        self.found.versions[part["ref"]] += 1
        if version not in allowed:
            self.found.problem(
                f"{name}: version {version} answered, {ALIAS} led to {sorted(allowed)}"
            )

    def _allowed(self, name: str, asked: float, over: float) -> set[int]:
        led, ends = self.led[name], self.over[name]
        return {
            here.version
            for place, here in enumerate(led)
            # The move away from here was over before the question: nobody may be led here any more.
            if here.since <= over and not (place < len(ends) and ends[place] < asked)
        }


async def _read(answer: Any, is_streamed: bool) -> tuple[str, dict[str, Any]]:
    """(the words, the reply or the last chunk of it)."""
    if not is_streamed:
        whole = json.loads(await answer.body())
        return whole["choices"][0]["text"], whole
    text = ""
    last: dict[str, Any] = {}
    async for event in answer.events():
        text += "".join(choice["text"] for choice in event.get("choices", ()))
        last = event if "loramux" in event else last
    return text, last


def prepared(home: Path) -> dict[str, int]:
    """A world with all versions published; digest -> content."""
    from loramux.registry import Registry

    world = prepare(home, len(NAMES) * VERSIONS)
    with Registry.open(home / "registry") as registry:
        return publish_all(world, registry)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.05, help="mean seconds between two moves")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-flips-") as folder:
        contents = prepared(Path(folder))
        with in_process(Path(folder), CONFIG) as served:
            flipping = Flipping(served, contents, given.seed)
            found = asyncio.run(flipping.run(given.flips, given.clients, given.pause))
    sys.stdout.write(json.dumps(vars(found)) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
