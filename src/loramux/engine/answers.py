"""Whole answers and streams, made of single steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many

from loramux.engine.request import Completion, Delta, Request, SamplingParams, as_request
from loramux.eval.progress import rows_bar


class Answers(ABC):
    """What an engine offers on top of `add_request`, `step` and `completion`."""

    def __init__(self) -> None:
        self._listeners: dict[str, deque[Delta]] = {}  # of the streams that are open

    @abstractmethod
    def add_request(self, request: Request) -> str: ...

    @abstractmethod
    def step(self) -> list[Delta]: ...

    @abstractmethod
    def completion(self, request_id: str) -> list[Completion] | None: ...

    @abstractmethod
    def forget(self, request_id: str) -> None: ...

    def _tell(self, deltas: Iterable[Delta]) -> None:
        """Hand every delta to the stream that waits for it, whoever made the step."""
        for delta in deltas:
            listener = self._listeners.get(delta.request_id)
            if listener is not None:
                listener.append(delta)

    def generate(
        self,
        requests: Iterable[Request | str | Many[int]],
        params: SamplingParams | None = None,
        *,
        show_progress: bool = False,
    ) -> list[list[Completion]]:
        """Answer all requests, in order; each gives `n` completions. Texts and token ids are requests to the base.

        If one cannot be answered, ValueError is raised and none is. show_progress: a bar on standard error.
        """
        ids: list[str] = []
        try:
            for request in requests:
                ids.append(self.add_request(as_request(request, params)))
            return self._finish(ids, show_progress)
        except BaseException:
            for request_id in ids:
                self.forget(request_id)
            raise

    def _finish(self, ids: Many[str], show_progress: bool) -> list[list[Completion]]:
        waiting, done = list(ids), {}
        with rows_bar(show_progress, "answer", len(ids)) as begin:
            advance = begin("")
            while waiting:
                self.step()
                for request_id in waiting:
                    found = self.completion(request_id)
                    if found is not None:
                        done[request_id] = found
                        advance(1)
                waiting = [request_id for request_id in waiting if request_id not in done]
        return [done[request_id] for request_id in ids]

    def stream(
        self, request: Request | str | Many[int], params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """One request's answer as it grows; several streams may be open, and others' requests go on meanwhile."""
        asked = as_request(request, params)
        request_id = self.add_request(asked)
        heard = self._listeners[request_id] = deque()
        left = asked.params.n
        try:
            while left:
                if not heard:
                    self.step()
                while heard:
                    delta = heard.popleft()
                    left -= delta.finish_reason is not None
                    yield delta
        finally:  # also when the caller stops listening
            del self._listeners[request_id]
            self.forget(request_id)
