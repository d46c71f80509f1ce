"""Talks to the server as a tenant would: inference with the official `openai` client, uploads over plain HTTP.

Every answer is judged by its receipt, never by what was asked; all receipts are kept to be verified at the end.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.demo.serve_home import OWNER
from loramux.errors import require

if TYPE_CHECKING:
    import httpx
    from openai import OpenAI

    from loramux.data.tasks import TaskRow

ANSWER_TOKENS = 12  # at most; an answer ends by itself
AT_ONCE = 8
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """A reply: its text, and the one entry of `answers` in its receipt."""

    text: str
    is_right: bool
    said: dict[str, Any] = field(repr=False)
    receipt: dict[str, Any] = field(repr=False)

    @property
    def parts(self) -> list[tuple[str, float]]:
        """(reference, weight) of what answered; none: the base."""
        return [(part["ref"], float(part["weight"])) for part in self.said["parts"]]

    @property
    def refs(self) -> tuple[str, ...]:
        return tuple(ref for ref, _ in self.parts)

    @property
    def who(self) -> str:
        """For people: tenant/name@2, a mix with its weights, or the base."""
        is_one = len(self.parts) == 1 and self.parts[0][1] == 1.0
        named = [ref if is_one else f"{ref}*{weight:g}" for ref, weight in self.parts]
        return " + ".join(named) or "the base"


class Talk:
    """Clients of the tenants. url: up to /v1; secrets: tenant -> key."""

    def __init__(self, url: str, secrets: Mapping[str, str], base: str) -> None:
        import httpx
        from openai import OpenAI

        self.url, self.base = url, base
        self.receipts: list[dict[str, Any]] = []
        self.clients: dict[str, OpenAI] = {
            tenant: OpenAI(base_url=url, api_key=secret, max_retries=0, timeout=TIMEOUT_S)
            for tenant, secret in secrets.items()
        }
        self.http: dict[str, httpx.Client] = {
            tenant: httpx.Client(
                base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=TIMEOUT_S
            )
            for tenant, secret in secrets.items()
        }

    def close(self) -> None:
        for tenant in self.clients:
            self.clients[tenant].close()
            self.http[tenant].close()

    def ask(
        self, model: str, row: TaskRow, *, tenant: str = OWNER, tokens: int = ANSWER_TOKENS
    ) -> Answer:
        """A task's question, decoded greedily."""
        from loramux.data.tasks import question

        done = self.clients[tenant].completions.create(
            model=model, prompt=question(row), max_tokens=tokens, temperature=0
        )
        return self._answer(done.choices[0].text, row, done.model_extra)

    def ask_all(
        self, asked: Sequence[tuple[str, TaskRow]], *, tokens: int = ANSWER_TOKENS
    ) -> list[Answer]:
        """(model, question) each, AT_ONCE at a time, so that they meet in batches."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(lambda one: self.ask(*one, tokens=tokens), asked))

    def stream(self, model: str, row: TaskRow) -> tuple[int, Answer]:
        """(pieces, answer) of a stream."""
        from loramux.data.tasks import question

        pieces, extra = [], None
        for chunk in self.clients[OWNER].completions.create(
            model=model, prompt=question(row), max_tokens=ANSWER_TOKENS, temperature=0, stream=True
        ):
            pieces += [choice.text for choice in chunk.choices]
            if "loramux" in (chunk.model_extra or {}):
                extra = chunk.model_extra
        return len(pieces), self._answer("".join(pieces), row, extra)

    def upload(
        self, name: str, archive: bytes, samples: Sequence[str] | None = None
    ) -> httpx.Response:
        """POST /v1/adapters."""
        fields = {"name": name}
        if samples is not None:
            fields["samples"] = json.dumps(list(samples))
        return self.http[OWNER].post(
            "/adapters", data=fields, files={"file": ("adapter.zip", archive)}
        )

    def _answer(self, text: str, row: TaskRow, extra: dict[str, Any] | None) -> Answer:
        receipt = (extra or {})["loramux"]["receipt"]
        self.receipts.append(receipt)
        (said,) = receipt["answers"]
        return Answer(text.strip(), text.strip() == row.answer, said, receipt)


@contextmanager
def talking(url: str, secrets: Mapping[str, str], base: str) -> Iterator[Talk]:
    talk = Talk(url, secrets, base)
    try:
        yield talk
    finally:
        talk.close()


def check_installed() -> None:
    """Before anything is trained: what the last part needs is there."""
    for module in ("fastapi", "uvicorn"):
        require(module, "serve", "the serving demo")
    require("openai", "dev", "the serving demo")
    require("httpx", "dev", "the serving demo")


def zipped(folder: Path, **other: bytes) -> bytes:
    """The files of an adapter as an archive; `other` replaces files by their stems."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = other.get(path.stem)
                archive.writestr(
                    str(path.relative_to(folder)), path.read_bytes() if data is None else data
                )
    return out.getvalue()
