"""Clients that ask for an alias while it moves, and what the replies carry. `LORAMUX_FLIPS`: how often it moves."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx

from server.rig import LOCAL

FLIPS = int(os.environ.get("LORAMUX_FLIPS", "50"))
CLIENTS = 6


class Flips:
    """Clients that ask `law@prod` while it moves between two versions, and what they got."""

    def __init__(self, app: Any) -> None:
        self.app, self.replies, self.is_over = app, list[tuple[int, str]](), False

    async def run(self) -> None:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as http:
            clients = [asyncio.ensure_future(self._ask(http, i)) for i in range(CLIENTS)]
            for i in range(FLIPS):
                # Held back until somebody was answered: every flip meets requests under way.
                seen = len(self.replies)
                moved = await http.put("/v1/adapters/law/aliases/prod", json={"version": 1 + i % 2})
                assert moved.status_code == 200, moved.text
                while len(self.replies) == seen and not any(task.done() for task in clients):
                    await asyncio.sleep(0.001)
            self.is_over = True
            await asyncio.gather(*clients)

    async def _ask(self, http: httpx.AsyncClient, place: int) -> None:
        body = {
            "model": "law@prod", "prompt": [7 + place, 20], "max_tokens": 6, "temperature": 0,
            "stream": place % 2 == 0, "ignore_eos": True,
        }  # fmt: skip
        while not self.is_over:
            reply = await http.post("/v1/completions", json=body)
            self.replies.append((reply.status_code, reply.text))


def last_of(text: str) -> dict[str, Any]:
    """A whole reply, or the chunk of a stream that carries the receipt."""
    if "data: [DONE]" not in text:
        found: dict[str, Any] = json.loads(text)
        return found
    chunks = [json.loads(x[6:]) for x in text.splitlines() if x.startswith("data: {")]
    [found] = [chunk for chunk in chunks if chunk.get("loramux")]
    return found
