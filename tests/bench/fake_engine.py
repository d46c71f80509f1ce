"""Stands in for the engine where only the order of calls matters: every running request gains a token a step."""

from __future__ import annotations

from loramux.engine.request import Answered, Completion, Delta


class FakeEngine:
    """At most `max_batch` requests run; the rest wait in order. `clock` is moved by `seconds` per step.

    `loses`: number of the step that leaves out one request's token. `fails`: ids that end in an error.
    """

    def __init__(self, max_batch=64, clock=None, seconds=1.0, loses=None, fails=()):
        self.max_batch, self.clock, self.seconds = max_batch, clock, seconds
        self.loses, self.fails = loses, set(fails)
        self.waiting, self.running, self.done = [], [], {}
        self.requests, self.aborted = {}, []
        self.steps = self.added = 0
        self.is_closed = False

    def add_request(self, request):
        request_id = f"r{self.added}"
        self.added += 1
        self.requests[request_id] = request
        self.waiting.append([request_id, 0])
        return request_id

    def has_work(self):
        return bool(self.waiting or self.running)

    def step(self):
        self.steps += 1
        if self.clock is not None:
            self.clock.time += self.seconds
        while self.waiting and len(self.running) < self.max_batch:
            self.running.append(self.waiting.pop(0))
        deltas = []
        for number, entry in enumerate(list(self.running)):
            if self.steps == self.loses and number == 0:
                continue
            deltas.append(self._advance(entry))
        return deltas

    def _advance(self, entry):
        request_id = entry[0]
        entry[1] += 1
        failed = request_id in self.fails
        is_last = failed or entry[1] >= self.requests[request_id].params.max_tokens
        if is_last:
            self.running.remove(entry)
            self._finish(entry, "error" if failed else "length")
        return Delta(
            request_id=request_id,
            index=0,
            text="",
            token_ids=() if failed else (7,),
            finish_reason=("error" if failed else "length") if is_last else None,
            error="its logits were not numbers" if failed else None,
        )

    def _finish(self, entry, reason):
        request = self.requests[entry[0]]
        self.done[entry[0]] = Completion(
            request_id=entry[0],
            index=0,
            tenant=request.tenant,
            text="",
            token_ids=(7,) * entry[1],
            finish_reason=reason,
            answered=Answered(""),
            prompt_tokens=len(request.prompt),
        )

    def abort(self, request_id):
        self.aborted.append(request_id)
        for queue in (self.waiting, self.running):
            for entry in list(queue):
                if entry[0] == request_id:
                    queue.remove(entry)
                    self._finish(entry, "abort")

    def completion(self, request_id):
        return [self.done.pop(request_id)]

    def close(self):
        self.is_closed = True


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def skip_to(self, at):
        self.time = max(self.time, at)
