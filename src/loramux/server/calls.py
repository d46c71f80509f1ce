"""One inference call from admission to its last token: place, quota, adapters, answers, and the books afterwards.

Why one object: however a call ends (answered, refused, cancelled, a reader gone), the same steps give everything back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from loramux.engine.request import NOT_FINITE, Completion, Delta, Request, SamplingParams
from loramux.errors import LoramuxError
from loramux.formats.errors import OTHER_BASE
from loramux.server.errors import ApiError
from loramux.server.resolve import Plan
from loramux.server.services import Outcome, Services

log = logging.getLogger(__name__)
Item = tuple[int, Delta]  # which prompt, what its answer grew by


class Call:
    """Use it as `async with`: entering admits, leaving settles. `deltas` is read once."""

    def __init__(
        self,
        services: Services,
        call_id: str,
        caller: Any,
        choose: Callable[[], Awaitable[Plan]],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
    ):
        self.services, self.id, self.caller = services, call_id, caller
        self.params, self._choose = params, choose
        self.plan: Plan  # once admitted
        self.prompts = tuple(prompts)
        self.created = int(services.clock())
        self.headers: dict[str, str] = {}
        self.outcome: Outcome | None = None
        self.receipt: dict[str, Any] | None = None
        self.receipt_headers: dict[str, str] = {}
        self.failure: str | None = None
        self._answers: list[Any] = []
        self._reservation: Any = None
        self._stack = AsyncExitStack()
        self._num_generated = 0
        self._is_asked = self._is_running = False

    # --- Admission and its reverse --------------------------------------------------------------

    async def __aenter__(self) -> Call:
        try:
            await self._admit()
        except BaseException:
            await self._leave("refused")
            raise
        return self

    async def _admit(self) -> None:
        services, caller = self.services, self.caller
        services.check_room(caller)  # in this order, whatever changed since the body began
        self._stack.enter_context(services.gate.enter(caller.tenant))
        if services.tenancy is not None:
            quotas = services.tenancy.quotas
            self._stack.enter_context(quotas.hold(caller))
            self._reservation = quotas.reserve(caller, self.most_tokens)
            self.headers.update(self._reservation.headers())
            await services.weights.apply(caller)
        # Only now: choosing may encode a prompt, and a flood of such calls must meet the bounds first.
        self.plan = await self._choose()
        await self._stack.enter_async_context(services.loaded.pinned(self.plan.versions))
        if self.plan.assembled is not None:
            await self._stack.enter_async_context(self.plan.assembled.held(services))

    @property
    def most_tokens(self) -> int:
        """What the call may use at most."""
        prompts = sum(len(prompt) for prompt in self.prompts)
        return prompts + len(self.prompts) * self.params.n * self.params.max_tokens

    @property
    def debit(self) -> int:
        """What it used: all its prompts, whatever they were cut off by, and what was drawn.

        Who leaves before the first token pays for the prompts as well, or long ones would be read for nothing.
        """
        was_refused = not self._is_running and self.failure in ("invalid_request", "overloaded")
        if not self._is_asked or was_refused:
            return 0
        return sum(len(prompt) for prompt in self.prompts) + self._num_generated

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        await self._leave(None if error is None else type(error).__name__)

    async def _leave(self, failure: str | None) -> None:
        if self._reservation is not None:
            if self.debit:
                self._reservation.settle(self.debit)
            else:
                self._reservation.cancel()
            self._reservation = None
        try:
            self.finish(failure)
        finally:
            await self._stack.aclose()

    def finish(self, failure: str | None = None) -> None:
        """Close the books of what answered; once. The receipt is there from then on."""
        if self.outcome is not None or not self._is_asked:
            return
        self.failure = self.failure or failure
        self.outcome = Outcome(
            id=self.id, created=self.created, caller=self.caller, plan=self.plan,
            prompts=self.prompts, params=self.params, completions=tuple(self.completions),
            debit=self.debit, failure=self.failure,
            by_prompt=tuple(tuple(answer.completions) for answer in self._answers),
        )  # fmt: skip
        if self.services.signer is not None and self._is_running:
            receipt = self.services.signer.issue(self.outcome)
            self.receipt, self.receipt_headers = receipt.to_json(), receipt.headers()
        for observer in self.services.observers:
            observer.finished(self.outcome)

    @property
    def completions(self) -> list[Completion]:
        """In order of prompt, then sample; those that are there."""
        return [done for answer in self._answers for done in answer.completions]

    # --- Answers --------------------------------------------------------------------------------

    async def deltas(self) -> AsyncGenerator[Item, None]:
        """What all answers grow by. Raises ApiError if the engine refuses the call; an answer's own error ends it."""
        requests = [self._request(prompt) for prompt in self.prompts]
        self._answers = [self.services.engine.answer(request) for request in requests]
        self._is_asked = True
        for observer in self.services.observers:
            observer.admitted(self.id, self.plan, self.caller)
        source = self._one() if len(self._answers) == 1 else self._many()
        async with aclosing(source):
            try:
                async for place, delta in source:
                    self._note(delta)
                    yield place, delta
            except LoramuxError as error:  # the engine was shut down
                self.failure = "overloaded"
                log.warning("%s: %s", self.id, error)
                raise ApiError("the server is stopping", code="overloaded") from None
            except ValueError as error:
                # Raised before anything ran: the text says what of the request cannot be.
                self.failure = "invalid_request"
                raise ApiError(str(error), code="invalid_request") from None
        self.finish()

    def _request(self, prompt: Sequence[int]) -> Request:
        caller = self.caller
        return Request(
            prompt=prompt, adapter=self.plan.adapter, params=self.params,
            tenant=caller.tenant, salt=getattr(caller, "salt", None) or caller.tenant,
        )  # fmt: skip

    def _note(self, delta: Delta) -> None:
        self._is_running = True
        self._num_generated += len(delta.token_ids)
        for observer in self.services.observers:
            observer.delta(self.id, len(delta.token_ids))
        if delta.finish_reason in ("error", "abort"):
            self.failure = self.failure or f"engine_{delta.finish_reason}"
            log.warning("%s: an answer ended: %s", self.id, delta.error or delta.finish_reason)

    async def _one(self) -> AsyncGenerator[Item, None]:
        async with aclosing(self._answers[0]) as answer:
            async for delta in answer:
                yield 0, delta

    async def _many(self) -> AsyncGenerator[Item, None]:
        """The answers to several prompts, as they come. The queue is bounded by what the call may generate."""
        queue: asyncio.Queue[Item | BaseException | None] = asyncio.Queue()

        async def pump(place: int, answer: Any) -> None:
            try:
                async with aclosing(answer):
                    async for delta in answer:
                        queue.put_nowait((place, delta))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [
            asyncio.ensure_future(pump(place, answer)) for place, answer in enumerate(self._answers)
        ]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def failed_answer(delta: Delta) -> ApiError:
    """What a client is told about an answer that the engine ended. Its own text may hold paths: it is in the log."""
    if delta.finish_reason == "abort":
        return ApiError("the server is stopping", code="overloaded")
    code = getattr(delta.error, "code", "")  # the words are the readers' own and may be reworded
    if code == OTHER_BASE:
        return ApiError(
            "an adapter of this call was trained on another base model than this server's; train it on this one",
            code="wrong_base", param="model",
        )  # fmt: skip
    if code == NOT_FINITE:
        return ApiError(
            "the model's probabilities are not finite with these adapters; try others",
            code="not_finite", status=500,
        )  # fmt: skip
    return ApiError(
        "the answer could not be made; the server's log says why", code="engine_error", status=500
    )
