"""Engines under measurement: a batch that decodes, a batch of prompts, and the requests both are made of.

An engine's context grows by a token a step, so a decoding batch is started again every few measurements, with prompts
short of the wanted context by half of what it grows in between: on average the context is that of a subject that is cut
back after each measurement. A step of an engine includes choosing the next tokens (greedy) and handing them out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.bench.rounds import cpu_seconds
from loramux.bench.shape import twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESTART_EVERY = 8
ENDLESS = 100_000  # steps that may pass before a batch counts as stuck
MIB = 1 << 20

Asked = str | Mapping[str, float] | None
"""What a request names: nothing, an adapter, or a weighted mix."""


@dataclass(frozen=True)
class Batch:
    """Requests that run together: what each of them names, and the length of their prompts. `seed` gives the tokens."""

    asked: tuple[Asked, ...]
    length: int
    vocab: int
    seed: int = 0

    def prompts(self, draw: int = 0) -> list[list[int]]:
        """A prompt per request, other ones for another `draw`."""
        rng = random.Random(f"{self.seed} {draw}")
        return [[rng.randrange(self.vocab) for _ in range(self.length)] for _ in self.asked]


def build_engine(
    model: PreTrainedModel, folders: Mapping[str, Path], *, batch: int, context: int, **options: Any
) -> Any:
    """An engine over the weights of `model`, with room for `batch` requests of `context` tokens and all adapters.

    Each engine gets a module tree of its own, since it replaces the linears of the model it is given.
    """
    from loramux import Engine

    room: dict[str, Any] = {
        "max_batch": batch,
        "kv_memory": f"{kv_mib(model.config, batch * context)}MiB",
        "max_step_tokens": max(2048, batch * context),
    }
    engine = Engine(twin_of(model), **(room | options))
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


def how_decode_runs(model: PreTrainedModel) -> str:
    """Whether an engine over this model captures its decode steps."""
    with build_engine(model, {}, batch=1, context=16) as engine:
        off = engine.stats()["graphs"]["off"]
    return (
        f"launch by launch: {off}" if off else "captured as graphs where routers leave nothing open"
    )


def kv_mib(config: Any, tokens: int) -> int:
    """MiB of keys and values for that many tokens in bf16, half as many again and 16 MiB to spare."""
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * 2
    return 16 + int(1.5 * tokens * per_token / MIB)


def start(engine: Any, batch: Batch, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
    """Ask for all of a batch; the ids."""
    from loramux.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [
        engine.add_request(Request(prompt=prompt, adapter=asked, params=params, tenant=f"t{i}"))
        for i, (asked, prompt) in enumerate(zip(batch.asked, prompts, strict=True))
    ]


def count_tokens(deltas: Sequence[Any]) -> int:
    """Tokens handed out; a request that ended in an error ends the measurement."""
    for delta in deltas:
        if delta.error is not None:
            raise RuntimeError(f"request {delta.request_id} failed while timed: {delta.error}")
    return sum(len(delta.token_ids) for delta in deltas)


class Decoding:
    """A batch in its decode phase; a call gives the seconds of `steps` steps after `warm` others.

    Every step must answer every request with a token: a batch that lost one is not what is to be timed.
    """

    def __init__(
        self,
        engine: Any,
        batch: Batch,
        steps: int,
        warm: int = 1,
        restart_every: int = RESTART_EVERY,
    ):
        self.engine, self.steps, self.warm, self.every = engine, steps, warm, restart_every
        self.growth = restart_every * (warm + steps)
        short = (self.growth - warm - steps) // 2
        self.batch = replace(batch, length=max(2, batch.length - short))
        self.ids: list[str] = []
        self.calls = 0
        self.tokens = 0

    def __call__(self) -> float:
        if self.calls % self.every == 0:
            self.restart()
        self.calls += 1
        for _ in range(self.warm):
            self.engine.step()
        self.tokens = 0
        seconds = cpu_seconds(self._timed)
        expected = self.steps * len(self.ids)
        if self.tokens != expected:
            raise RuntimeError(
                f"{self.steps} steps of {len(self.ids)} requests gave {self.tokens} tokens, not {expected}"
            )
        return seconds

    def _timed(self) -> None:
        for _ in range(self.steps):
            self.tokens += count_tokens(self.engine.step())

    def restart(self) -> None:
        """A batch from its beginning, up to where all of it decodes."""
        self.stop()
        batch = self.next_batch()
        # More than the calls until the next restart take: none may end while others still run their prompt.
        self.ids = start(self.engine, batch, batch.prompts(), 4 * (self.growth + 16))
        behind = dict.fromkeys(self.ids)
        for _ in range(ENDLESS):
            deltas = self.engine.step()
            count_tokens(deltas)
            for delta in deltas:
                if delta.token_ids:
                    behind.pop(delta.request_id, None)
            if not behind:
                return
        raise RuntimeError(f"{len(behind)} of {len(self.ids)} requests never came to decode")

    def next_batch(self) -> Batch:
        """What the next restart asks for."""
        return self.batch

    def stop(self) -> None:
        """Abort what runs, and leave nothing behind in the engine."""
        for request in self.ids:
            self.engine.abort(request)
        drain(self.engine)
        for request in self.ids:
            self.engine.completion(request)
        self.ids = []


class Prompting:
    """Whole prompts, each with its own adapter, up to their first tokens; fresh prompts in every call."""

    def __init__(self, engine: Any, batch: Batch):
        self.engine, self.batch = engine, batch
        self.calls = 0
        self.tokens = 0

    def __call__(self) -> float:
        prompts = self.batch.prompts(self.calls)
        self.calls += 1
        self.tokens = 0
        ids: list[str] = []
        seconds = cpu_seconds(lambda: self._timed(prompts, ids))
        for request in ids:
            self.engine.completion(request)
        if self.tokens != len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts gave {self.tokens} tokens")
        return seconds

    def _timed(self, prompts: list[list[int]], ids: list[str]) -> None:
        ids += start(self.engine, self.batch, prompts, 1)
        while self.engine.has_work():
            self.tokens += count_tokens(self.engine.step())


def drain(engine: Any) -> None:
    """Step until nothing is left to do."""
    for _ in range(ENDLESS):
        if not engine.has_work():
            return
        engine.step()
    raise RuntimeError(f"the engine still had work after {ENDLESS} steps")
