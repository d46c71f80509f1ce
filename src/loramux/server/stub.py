"""A stand-in for the engine, the tokenizer and the registry: for tests of routes and for load without a model.

Why in the package: the load benchmark and other test folders use it as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loramux.engine.request import Answered, Completion, Delta, FinishReason, Request, TokenLogprob
from loramux.errors import LoramuxError

BASE_DIGEST = "0" * 64


class StubTokenizer:
    """One token per byte of UTF-8; ids 0..255. No model needs to know them."""

    eos_token_id = 0
    chat_template = "stub"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int] | int, **_: Any) -> str:
        ids = [ids] if isinstance(ids, int) else ids
        return bytes(token for token in ids if 0 <= token < 256).decode(errors="replace")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([token]) for token in ids]

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        **_: Any,
    ) -> str:
        said = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return said + ("<assistant>" if add_generation_prompt else "")


class StubEngine:
    """Answers every request with the start of its adapters' digests, a token a tick.

    It knows adapters by name and remembers where they lie, as the engine does; `delay_s` is the time of a token,
    `fail` the error that the next request ends with.
    """

    def __init__(self, delay_s: float = 0.0, tokenizer: Any = None):
        self.delay_s = delay_s
        self.tokenizer = tokenizer or StubTokenizer()
        self.folders: dict[str, Any] = {}
        self.weights: dict[str, float] = {}
        self.fail: str | None = None
        self.running = 0
        self.served = 0
        self.is_closed = False

    # What `call(lambda engine: ...)` reaches.
    def add_adapter(self, name: str, source: Any) -> None:
        self.folders[name] = source

    def remove_adapter(self, name: str) -> None:
        if name not in self.folders:
            raise ValueError(f"no adapter {name!r} is known")
        del self.folders[name]

    def set_tenant_weight(self, tenant: str, weight: float) -> None:
        self.weights[tenant] = weight

    @property
    def adapters(self) -> list[str]:
        return list(self.folders)

    def stats(self) -> dict[str, Any]:
        return {
            "steps": self.served,
            "scheduler": {"num_running": self.running, "num_waiting": 0},
            "adapters": {"num_slots_pinned": 0},
            "kv_blocks": 1,
            "kv_blocks_free": 1,
            "kv_blocks_cached": 0,
        }

    # What the server calls.
    def answer(self, request: Request) -> StubAnswer:
        return StubAnswer(self, request)

    def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        return self.answer(request).__aiter__()

    async def call(self, function: Callable[[Any], Any]) -> Any:
        return function(self)

    async def shutdown(self, *, finish: bool = True) -> None:
        self.is_closed = True


class StubAnswer:
    """The words of one request: the adapters' digests, eight characters each, or "base"."""

    def __init__(self, engine: StubEngine, request: Request):
        self.completions: list[Completion] = []
        self._engine, self._request = engine, request
        self._deltas: AsyncGenerator[Delta, None] | None = None

    def __aiter__(self) -> AsyncGenerator[Delta, None]:
        self._deltas = self._run()
        return self._deltas

    async def aclose(self) -> None:
        if self._deltas is not None:
            await self._deltas.aclose()

    async def _run(self) -> AsyncGenerator[Delta, None]:
        engine, request = self._engine, self._request
        unknown = [name for name, _ in request.mix if name not in engine.folders]
        if unknown:
            raise ValueError(f"no adapter {unknown[0]!r} is known")
        prompt = (
            engine.tokenizer(request.prompt)["input_ids"]
            if isinstance(request.prompt, str)
            else request.prompt
        )
        request_id = request.id or f"stub-{id(self)}"
        word = "+".join(name[:8] for name, _ in request.mix) or "base"
        params = request.params
        tokens = list(word.encode())[: params.max_tokens]
        reason: FinishReason = "length" if len(word.encode()) >= params.max_tokens else "stop"
        error, engine.fail = engine.fail, None
        end: FinishReason = "error" if error else reason
        start = time.perf_counter()
        engine.running += 1
        try:
            for index in range(params.n):
                for place, token in enumerate(tokens):
                    await asyncio.sleep(engine.delay_s)
                    is_last = place == len(tokens) - 1
                    yield Delta(
                        request_id=request_id, index=index, text=chr(token), token_ids=(token,),
                        logprobs=_logprobs(token, params.logprobs),
                        finish_reason=end if is_last else None,
                        error=error if is_last else None,
                    )  # fmt: skip
            spent = time.perf_counter() - start
            parts = tuple(
                (name, hashlib.sha256(name.encode()).hexdigest(), weight)
                for name, weight in request.mix
            )
            self.completions = [
                Completion(
                    request_id=request_id, index=index, tenant=request.tenant, text=word[: len(tokens)],
                    token_ids=tuple(tokens), finish_reason=end,
                    answered=Answered(BASE_DIGEST, parts), prompt_tokens=len(prompt), error=error,
                    logprobs=tuple(lp for token in tokens for lp in _logprobs(token, params.logprobs)),
                    first_token_s=spent, total_s=spent,
                )
                for index in range(params.n)
            ]  # fmt: skip
            engine.served += 1
        finally:
            engine.running -= 1


def _logprobs(token: int, wanted: int | None) -> tuple[TokenLogprob, ...]:
    if wanted is None:
        return ()
    top = tuple((token + place, -0.1 - place) for place in range(wanted))
    return (TokenLogprob(token=token, logprob=-0.1, top=top),)


class StubRegistry:
    """Versions in memory: what resolving, listing and serving need of a registry, and nothing of its guarantees."""

    def __init__(self) -> None:
        self.kept: dict[str, list[StubVersion]] = {}  # "tenant/name" -> versions
        self.aliases: dict[tuple[str, str], int] = {}
        self.num_changes = 0
        self.num_lookups = 0

    def add(self, tenant: str, name: str, **fields: Any) -> StubVersion:
        """Publish another version and point `latest` at it."""
        kept = self.kept.setdefault(f"{tenant}/{name}", [])
        number = len(kept) + 1
        digest = hashlib.sha256(f"{tenant}/{name}@{number}".encode()).hexdigest()
        told = {"tenant": tenant, "name": name, "version": number, "digest": digest}
        version = StubVersion(**{**told, "aliases": ("latest",), **fields})
        kept[:] = [replace(each, aliases=()) for each in kept]
        kept.append(version)
        self.aliases[f"{tenant}/{name}", "latest"] = number
        self.num_changes += 1
        return version

    def set_alias(self, ref: str, alias: str, version: int, **_: Any) -> None:
        self.aliases[ref, alias] = version
        self.num_changes += 1

    def resolve(self, ref: str, *, caller: str | None) -> StubVersion:
        self.num_lookups += 1
        path, _, wanted = str(ref).partition("@")
        key = path if "/" in path else f"{caller or 'local'}/{path}"
        kept = self.kept.get(key, [])
        number = int(wanted) if wanted.isdigit() else self.aliases.get((key, wanted or "latest"), 0)
        if 1 <= number <= len(kept) and self._may(kept[number - 1], caller):
            return kept[number - 1]
        raise StubNotFound("no such adapter")

    def visible(self, caller: str | None, base: str | None = None) -> list[StubVersion]:
        newest = [kept[-1] for kept in self.kept.values()]
        return [
            v
            for v in newest
            if self._may(v, caller) and (base is None or v.base_digest in (None, base))
        ]

    def _may(self, version: StubVersion, caller: str | None) -> bool:
        return caller in (None, version.tenant) or version.visibility == "shared"

    def generation(self) -> int:
        return self.num_changes

    def folder(self, version: Any) -> Path:
        return Path("stub") / str(version.digest)

    def close(self) -> None:
        """Nothing is open."""


class StubNotFound(LoramuxError):
    """As the registry's NotFound."""

    code = "model_not_found"


@dataclass(frozen=True)
class StubVersion:
    """As the registry's Version."""

    tenant: str
    name: str
    version: int
    digest: str
    base_digest: str | None = None
    method: str = "lora"
    servability: str = "static"
    max_rank: int = 8
    num_bytes: int = 1000
    created_at: float = 0.0
    visibility: str = "private"
    aliases: tuple[str, ...] = field(default=(), compare=False)

    @property
    def ref(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"
