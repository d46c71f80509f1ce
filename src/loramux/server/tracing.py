"""OpenTelemetry spans of inference calls, where it is asked for; without it nothing of it is imported.

One span per call, under the caller's `traceparent`, with the attributes of the GenAI semantic conventions. What was
said is never in a span: counts, digests and times are.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from loramux.errors import require

if TYPE_CHECKING:
    from loramux.server.resolve import Plan
    from loramux.server.services import Outcome

log = logging.getLogger(__name__)
NAME = "loramux"
OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Tracing:
    """An ASGI layer that opens a span per call, and an Observer that fills it in. `provider`: a TracerProvider."""

    def __init__(self, provider: Any = None) -> None:
        # FastAPI brings the API without the SDK, and then every span is lost without a word.
        require("opentelemetry.sdk.trace", "otel", "tracing")
        trace = require("opentelemetry.trace", "otel", "tracing")
        context = require("opentelemetry.trace.propagation.tracecontext", "otel", "tracing")
        if provider is None and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            log.warning(
                "tracing is on and no exporter is set up; start with opentelemetry-instrument"
            )
        self._kind, self._status = trace.SpanKind.SERVER, trace.Status
        self._error = trace.StatusCode.ERROR
        self._set_span = trace.set_span_in_context
        self._propagator = context.TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer(NAME, tracer_provider=provider)
        # Each task sees the span of its own request.
        self._current: ContextVar[Any] = ContextVar("loramux_span", default=None)
        self._spans: dict[str, Any] = {}

    # --- The ASGI layer --------------------------------------------------------------------------

    def around(self, app: Any) -> Any:
        """The application with spans around its inference routes."""

        async def traced(scope: MutableMapping[str, Any], receive: Any, send: _Send) -> None:
            operation = OPERATIONS.get(scope.get("path", "")) if scope["type"] == "http" else None
            if operation is None:
                await app(scope, receive, send)
                return
            await self._run(app, scope, receive, send, operation)

        return traced

    async def _run(
        self, app: Any, scope: MutableMapping[str, Any], receive: Any, send: _Send, operation: str
    ) -> None:
        given = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        parent = self._propagator.extract(given)
        span = self._tracer.start_span(
            operation, context=parent, kind=self._kind,
            attributes={"gen_ai.operation.name": operation, "gen_ai.provider.name": NAME},
        )  # fmt: skip
        token = self._current.set(span)

        async def tagged(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(self._status(self._error))
                out: dict[str, str] = {}
                self._propagator.inject(out, context=self._set_span(span))
                added = [(key.encode(), value.encode()) for key, value in out.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            await app(scope, receive, tagged)
        except BaseException:
            span.set_status(self._status(self._error))
            raise
        finally:
            self._current.reset(token)
            span.end()

    # --- The observer ---------------------------------------------------------------------------

    def admitted(self, call_id: str, plan: Plan, caller: Any) -> None:
        """The call is with the engine."""
        span = self._current.get()
        if span is None:
            return
        self._spans[call_id] = span
        span.set_attribute("gen_ai.request.model", plan.label)
        span.set_attribute("loramux.adapter.digests", [digest for digest, _ in plan.mix])
        span.set_attribute("loramux.adapter.weights", [weight for _, weight in plan.mix])

    def delta(self, call_id: str, num_tokens: int) -> None:
        """It grew: nothing that a span tells."""

    def finished(self, outcome: Outcome) -> None:
        """It is over, however."""
        span = self._spans.pop(outcome.id, None)
        if span is None:
            return
        params = outcome.params
        attributes = {
            "gen_ai.response.id": outcome.id,
            "gen_ai.response.model": outcome.plan.label,
            "gen_ai.response.finish_reasons": [done.finish_reason for done in outcome.completions],
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.completion_tokens,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.choice.count": params.n,
        }
        if params.seed is not None:
            attributes["gen_ai.request.seed"] = params.seed
        if outcome.failure is not None:
            attributes["error.type"] = outcome.failure
            span.set_status(self._status(self._error))
        span.set_attributes(attributes)
