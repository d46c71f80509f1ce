"""What a running server consists of, as the routes see it.

Why protocols: the routes are tested with stubs, and lower layers stay replaceable.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from loramux.engine.request import Completion, Delta, Request, SamplingParams

if TYPE_CHECKING:
    from loramux.server.limits import Gate
    from loramux.server.loaded import LoadedAdapters
    from loramux.server.resolve import Names, Plan


class EngineFront(Protocol):
    """`loramux.engine.aio.AsyncEngine`, or `loramux.server.stub.StubEngine`."""

    def answer(self, request: Request) -> AnswerStream: ...
    async def call(self, function: Callable[[Any], Any]) -> Any: ...
    async def shutdown(self, *, finish: bool = True) -> None: ...


class AnswerStream(Protocol):
    """The deltas of a request; once they are over, `completions` says which weights answered."""

    completions: list[Completion]

    def __aiter__(self) -> AsyncGenerator[Delta, None]: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """An answered call, for receipts, metrics and quotas. Holds token ids: whoever stores it hashes them first.

    `completions` are in order of prompt, then sample; `prompts` are the token ids of each prompt. `failure` is the
    code of the error that ended it, None if it was answered.
    """

    id: str
    created: int
    caller: Any
    plan: Plan
    prompts: tuple[Sequence[int], ...]
    params: SamplingParams
    completions: tuple[Completion, ...]
    debit: int
    failure: str | None = None
    by_prompt: tuple[tuple[Completion, ...], ...] = ()  # the completions, per prompt

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(done.token_ids) for done in self.completions)


class Observer(Protocol):
    """Told what happens to inference calls; it must not block and must not raise."""

    def admitted(self, call_id: str, plan: Plan, caller: Any) -> None:
        """The call is with the engine."""

    def delta(self, call_id: str, num_tokens: int) -> None:
        """It grew."""

    def finished(self, outcome: Outcome) -> None:
        """It is over, however."""


class Receipts(Protocol):
    """Signs what answered."""

    def issue(self, outcome: Outcome) -> Any:
        """A signed `loramux.server.receipts.Receipt`."""


@dataclass(eq=False)
class Services:
    """One server's parts. `tenancy` None: one user without keys. `retriever` None: no `auto`.

    `names` and `loaded` and `gate` are made by `create_app`. After changing the registry in this process, call
    `names.forget()`; requests that change `/v1/adapters` do so by themselves.
    """

    engine: EngineFront
    registry: Any
    tokenizer: Any
    tenancy: Any = None
    retriever: Any = None
    signer: Receipts | None = None
    base: Any = None  # registry.checks.BaseShape
    max_length: int | None = None  # positions of the base
    clock: Callable[[], float] = time.time
    observers: list[Observer] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)  # of single routes: metrics registry, ...
    names: Names = field(init=False)
    loaded: LoadedAdapters = field(init=False)
    gate: Gate = field(init=False)
    weights: Any = None  # tenancy.weights.Weights; with tenancy only

    def check_room(self, caller: Any) -> None:
        """The refusal that an inference call of this caller would meet now; nothing is taken.

        429 for what is the tenant's own doing comes before 503: coming again soon would not help it.
        """
        self.gate.check_share(caller.tenant)
        if self.tenancy is not None:
            self.tenancy.quotas.check_room(caller)
        self.gate.check_places()

    @property
    def base_digest(self) -> str | None:
        return getattr(self.base, "digest", None)
