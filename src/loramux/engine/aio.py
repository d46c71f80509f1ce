"""The engine behind `async`: one thread steps it, any number of tasks wait for their answers.

Why a thread: a step holds the processor for tens of milliseconds, and an event loop must not. All calls into the engine
are made by that thread, between two steps, so the engine needs no locks; tasks leave orders and wait for the outcome.

A consumer that goes away (its task is cancelled, or it leaves the `async for`) aborts its request. If a step raises,
every waiter gets that error and the engine takes no more requests.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from loramux.engine.request import Completion, Delta, Request, SamplingParams, as_request
from loramux.errors import LoramuxError

log = logging.getLogger(__name__)

PAUSE_S = 0.001
QUICK_STEP_S = 0.0005  # a step that runs the model takes longer


class Stepped(Protocol):
    """What is needed of an engine. One thread makes all calls, but not the one that made the engine."""

    def add_request(self, request: Request) -> str: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Delta]: ...
    def has_work(self) -> bool: ...
    def completion(self, request_id: str) -> list[Completion] | None: ...
    def close(self) -> None: ...


class EngineClosedError(LoramuxError):
    """The engine takes no requests any more, or was shut down under a running one."""


class EngineFailedError(RuntimeError):
    """A step of the engine raised; the cause is attached."""


@dataclass(eq=False)
class _Consumer:
    """One waiting task. Its queue brings deltas, then None or the error that ends them."""

    loop: asyncio.AbstractEventLoop | None = None  # of the task; set before the thread learns of it
    queue: asyncio.Queue[Delta | BaseException | None] = field(default_factory=asyncio.Queue)
    open: set[int] = field(default_factory=set)  # samples whose end was not delivered; the thread's
    completions: list[Completion] = field(default_factory=list)


class Answer:
    """The deltas of one request, by `async for`; `completions` is there once they are over."""

    def __init__(self, deltas: AsyncGenerator[Delta, None], consumer: _Consumer):
        self._deltas, self._consumer = deltas, consumer

    @property
    def completions(self) -> list[Completion]:
        return self._consumer.completions

    def __aiter__(self) -> AsyncGenerator[Delta, None]:
        return self._deltas

    async def aclose(self) -> None:
        """Stop listening; a request that still runs is aborted."""
        await self._deltas.aclose()


_Mail = list[tuple[_Consumer, "Delta | BaseException | None"]]


class AsyncEngine:
    """Serve the tasks of any event loop with one engine. Use it as `async with`, or call `shutdown`.

    The engine belongs to it from here on: reach it through `call` only; shutdown closes it.
    """

    def __init__(self, engine: Stepped) -> None:
        self._engine = engine
        self._consumers: dict[str, _Consumer] = {}  # the thread's
        self._orders: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._is_open = True
        self._is_stopping = False
        self._cause: BaseException | None = None
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="loramux-engine", daemon=True)
        self._thread.start()

    def stream(
        self, request: Request | str | Many[int], params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of all samples of a request, as they come; a text or token ids are a request to the base.

        Nothing happens before the first `async for` round; that one raises ValueError if the request can never be
        answered.
        """
        return self._follow(as_request(request, params), _Consumer())

    def answer(self, request: Request) -> Answer:
        """Like `stream`, for those who want the completions as well: what answered is known when it is over."""
        consumer = _Consumer()
        return Answer(self._follow(request, consumer), consumer)

    async def generate(
        self,
        requests: Many[Request | str | Many[int]],
        params: SamplingParams | None = None,
    ) -> list[list[Completion]]:
        """Answer all requests, in order; each gives `n` completions. If one is refused the others are aborted."""
        tasks = [
            asyncio.ensure_future(self._complete(as_request(request, params)))
            for request in requests
        ]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def abort(self, request_id: str) -> None:
        """End a request whose consumer stays: its samples that run finish as "abort". Unknown ids are no error."""
        await asyncio.wrap_future(self._order(lambda: self._end_request(request_id)))

    async def call(self, function: Callable[[Any], Any]) -> Any:
        """`function(engine)` between two steps, such as adding an adapter; returns what it returns."""
        return await asyncio.wrap_future(self._order(lambda: function(self._engine)))

    async def shutdown(self, *, finish: bool = True) -> None:
        """Take no more requests; wait for those under way (finish=False: abort them); then close the engine."""
        with self._wake:
            self._is_open = False
            self._is_stopping = self._is_stopping or not finish
            self._wake.notify()
        # Shielded: several tasks may wait for the same end, and one that is cancelled must not cancel it.
        await asyncio.shield(asyncio.wrap_future(self._ended))
        self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shutdown(finish=error is None)

    # --- Called by tasks ------------------------------------------------------------------------

    async def _complete(self, request: Request) -> list[Completion]:
        consumer = _Consumer()
        async with aclosing(self._follow(request, consumer)) as deltas:
            async for _ in deltas:
                pass
        return consumer.completions

    async def _follow(self, request: Request, consumer: _Consumer) -> AsyncGenerator[Delta, None]:
        consumer.loop = asyncio.get_running_loop()
        admitted = self._order(lambda: self._admit(request, consumer))
        try:
            request_id = await asyncio.wrap_future(admitted)
        except asyncio.CancelledError:
            admitted.add_done_callback(self._abandon)
            raise
        is_over = False
        try:
            while not is_over:
                item = await consumer.queue.get()
                if isinstance(item, Delta):
                    yield item
                else:
                    is_over = True
                    if item is not None:
                        raise item
        finally:
            if not is_over:
                self._post(Future(), lambda: self._end_request(request_id))

    def _abandon(self, admitted: Future[Any]) -> None:
        """Nobody waits any more for a request that was being added."""
        if not admitted.cancelled() and admitted.exception() is None:
            request_id = admitted.result()
            self._post(Future(), lambda: self._end_request(request_id))

    def _order(self, run: Callable[[], Any]) -> Future[Any]:
        """Have the thread run something between two steps."""
        with self._wake:
            if not self._is_open:
                raise self._why_closed("the engine is shut down and takes no more requests")
            future: Future[Any] = Future()
            self._post(future, run)
        return future

    def _post(self, future: Future[Any], run: Callable[[], Any]) -> None:
        with self._wake:
            self._orders.append((future, run))
            self._wake.notify()

    def _why_closed(self, message: str) -> Exception:
        """A new exception for each who asks: tracebacks of several tasks do not mix."""
        return EngineClosedError(message) if self._cause is None else _failure(self._cause)

    # --- Called by the thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            log.exception("a step of the engine failed")
            with self._wake:
                self._cause, self._is_open = error, False
        try:
            try:
                self._end_all()
            finally:
                self._engine.close()
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    def _wait_for_work(self) -> bool:
        """Run the orders that are there; wait while there is nothing to do. False when it is time to end."""
        while True:
            while self._orders and not self._is_stopping:
                self._fulfil(*self._orders.popleft())
            has_work = self._engine.has_work()
            with self._wake:
                if self._is_stopping or not (self._is_open or has_work or self._orders):
                    return False
                if has_work:
                    return True
                if not self._orders:
                    self._wake.wait()

    def _fulfil(self, future: Future[Any], run: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    def _step(self) -> None:
        started = time.perf_counter()
        deltas = self._engine.step()
        if deltas:
            self._deliver(deltas)
        elif time.perf_counter() - started < QUICK_STEP_S:
            # All there is waits for an adapter: look again soon, without keeping a core busy.
            with self._wake:
                if not self._orders:
                    self._wake.wait(PAUSE_S)

    def _admit(self, request: Request, consumer: _Consumer) -> str:
        request_id = self._engine.add_request(request)
        consumer.open = set(range(request.params.n))
        self._consumers[request_id] = consumer
        return request_id

    def _deliver(self, deltas: list[Delta]) -> None:
        mail: _Mail = []
        try:
            for delta in deltas:
                consumer = self._consumers.get(delta.request_id)
                if consumer is None:
                    continue
                mail.append((consumer, delta))
                if delta.finish_reason is not None:
                    consumer.open.discard(delta.index)
                    if not consumer.open:
                        consumer.completions = self._engine.completion(delta.request_id) or []
                        del self._consumers[delta.request_id]
                        mail.append((consumer, None))
        finally:
            _send(mail)

    def _end_request(self, request_id: str) -> None:
        consumer = self._consumers.pop(request_id, None)
        if consumer is None:
            return
        try:
            self._engine.abort(request_id)
            consumer.completions = self._engine.completion(request_id) or []
        except BaseException as error:
            _send([(consumer, _failure(error))])
            raise
        ends: _Mail = [
            (consumer, Delta(request_id=request_id, index=index, text="", token_ids=(), finish_reason="abort"))
            for index in sorted(consumer.open)
        ]  # fmt: skip
        consumer.open = set()
        _send([*ends, (consumer, None)])

    def _end_all(self) -> None:
        """Tell every waiter why there is nothing more to come."""
        consumers, self._consumers = self._consumers, {}
        for request_id, consumer in consumers.items():
            consumer.open = set()
            if self._cause is None:  # what was said until now is known to who waits
                try:
                    self._engine.abort(request_id)
                    consumer.completions = self._engine.completion(request_id) or []
                except BaseException as error:  # the others must hear of their end as well
                    log.exception("a request could not be ended")
                    self._cause = error
            why = self._why_closed("the engine was shut down before the answer was done")
            _send([(consumer, why)])
        while self._orders:
            future, _ = self._orders.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(self._why_closed("the engine was shut down"))


def _failure(cause: BaseException) -> EngineFailedError:
    failure = EngineFailedError(f"a step of the engine failed: {cause!r}")
    failure.__cause__ = cause
    return failure


def _send(mail: _Mail) -> None:
    """Put everything into its queue, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, _Mail] = {}
    for consumer, item in mail:
        assert consumer.loop is not None
        by_loop.setdefault(consumer.loop, []).append((consumer, item))
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, items)
        except RuntimeError:
            log.debug("the event loop of a waiting task is closed")  # nobody is left to tell


def _put(mail: _Mail) -> None:
    for consumer, item in mail:
        consumer.queue.put_nowait(item)
