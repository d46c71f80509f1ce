"""Prometheus metrics of a server: vLLM's names where they mean the same, ours under `loramux_`.

Why an observer and not calls in the routes: the routes say what happens to a call (admitted, grew, over), and what is
counted is decided here. Names of adapters and tenants leave only through `metrics.py`, which knows who is looking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter

from loramux.server.labels import OTHER, TopLabels
from loramux.server.tally import Tallies

if TYPE_CHECKING:
    from loramux.engine.request import Completion
    from loramux.server.resolve import Plan
    from loramux.server.services import Outcome

LABELS = ("model_name", "engine")
ENGINE = "0"  # vLLM numbers its engines; there is one here
MAX_CODES = 64
# Buckets as in vLLM, so that existing dashboards keep their resolution.
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
# name -> (documentation, buckets)
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Time from arrival to the first token.", FIRST_TOKEN),
    "inter_token_latency_seconds": (
        "Time between two tokens, of calls with one sample.",
        BETWEEN_TOKENS,
    ),
    "request_time_per_output_token_seconds": ("Mean time per token of a sample.", BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("Time from arrival to the last token.", LATENCY),
    "request_queue_time_seconds": ("Time spent waiting.", LATENCY),
    "request_inference_time_seconds": ("Time spent running.", LATENCY),
    "request_prefill_time_seconds": ("Time spent on the prompt.", LATENCY),
    "request_decode_time_seconds": ("Time from the first token to the last.", LATENCY),
    "request_prompt_tokens": ("Tokens of a prompt.", COUNTS),
    "request_generation_tokens": ("Tokens of a sample.", COUNTS),
    "request_params_n": ("The parameter n.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("The parameter max_tokens.", COUNTS),
}
COUNTERS: Mapping[str, str] = {
    "prompt_tokens": "Prompt tokens of finished requests.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
}


@dataclass(eq=False)
class Track:
    """A call under way. `adapters`: (tenant, name) of each part."""

    adapters: tuple[tuple[str, str], ...]
    started: float
    last: float | None = None  # when the last token came
    gaps: list[float] = field(default_factory=list)


@dataclass
class Usage:
    """What a label has counted."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Metrics:
    """One server's counts, in a registry of its own. An `Observer`: told by the event loop only, never raises."""

    def __init__(
        self,
        model_name: str,
        *,
        max_lora: int = 0,
        top: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model_name, self.max_lora, self.top = model_name, max_lora, top
        self.registry = CollectorRegistry()
        self._clock = clock
        self.tracks: dict[str, Track] = {}
        self.by_adapter: dict[tuple[str, str], Usage] = {}
        self.by_tenant: dict[str, Usage] = {}
        self._adapters = TopLabels(top, self._drop_adapter)
        self._tenants = TopLabels(top, self._drop_tenant)
        own = self.registry
        labels = (model_name, ENGINE)
        self._histograms = Tallies(HISTOGRAMS, "vllm:", LABELS, labels)
        own.register(self._histograms)
        self._counters = {
            name: Counter(f"vllm:{name}", text, LABELS, registry=own).labels(*labels)
            for name, text in COUNTERS.items()
        }
        self._success = Counter(
            "vllm:request_success", "Finished samples.", (*LABELS, "finished_reason"), registry=own
        )
        self._failures = Counter(
            "loramux_failures", "Calls that ended with an error.", ("code",), registry=own
        )
        self._codes: set[str] = set()
        self._routing = Counter(
            "loramux_routing", "Calls by what was asked to answer.", ("choice",), registry=own
        )
        self._abstained = Counter(
            "loramux_auto_abstentions",
            "Calls to auto that no adapter was near enough to.",
            registry=own,
        )
        self._responses = Counter(
            "loramux_http_responses", "Responses by route and status.",
            ("method", "route", "status"), registry=own,
        )  # fmt: skip

    # --- Observer -------------------------------------------------------------------------------

    def admitted(self, call_id: str, plan: Plan, caller: Any) -> None:
        """The call is with the engine."""
        self.tracks[call_id] = Track(_adapters_of(plan), self._clock())
        self._routing.labels(_choice(plan)).inc()
        if getattr(plan.retrieved, "abstained", False):
            self._abstained.inc()

    def delta(self, call_id: str, num_tokens: int) -> None:
        """It grew."""
        track = self.tracks.get(call_id)
        if track is None or num_tokens < 1:
            return
        now = self._clock()
        if track.last is None:
            self._histograms["time_to_first_token_seconds"].observe(now - track.started)
        else:
            track.gaps.append(now - track.last)
        track.last = now

    def finished(self, outcome: Outcome) -> None:
        """It is over, however."""
        track = self.tracks.pop(outcome.id, None)
        if outcome.failure is not None:
            self._failures.labels(self._code(outcome.failure)).inc()
        for prompt in outcome.prompts:
            self._histograms["request_prompt_tokens"].observe(len(prompt))
        self._counters["prompt_tokens"].inc(outcome.prompt_tokens)
        self._counters["generation_tokens"].inc(outcome.completion_tokens)
        self._histograms["request_params_n"].observe(outcome.params.n)
        self._histograms["request_params_max_tokens"].observe(outcome.params.max_tokens)
        for done in outcome.completions:
            self._sample(done)
        # The deltas of several samples come interleaved: their gaps say nothing about any one of them.
        if track is not None and len(outcome.completions) == 1:
            self._histograms["inter_token_latency_seconds"].observe_all(track.gaps)
        self._account(outcome)

    def responded(self, method: str, route: str, status: int) -> None:
        """A response went out. `route`: the template, never the path that was asked for."""
        self._responses.labels(method, route, str(status)).inc()

    # --- Parts of it ----------------------------------------------------------------------------

    def _sample(self, done: Completion) -> None:
        seen = self._histograms
        num = len(done.token_ids)
        self._success.labels(self.model_name, ENGINE, done.finish_reason).inc()
        seen["request_generation_tokens"].observe(num)
        seen["e2e_request_latency_seconds"].observe(done.total_s)
        seen["request_queue_time_seconds"].observe(done.queue_s)
        seen["request_inference_time_seconds"].observe(max(0.0, done.total_s - done.queue_s))
        if done.index == 0:
            self._counters["prefix_cache_queries"].inc(done.prompt_tokens)
            self._counters["prefix_cache_hits"].inc(done.cached_tokens)
        if not num:
            return
        decode = max(0.0, done.total_s - done.first_token_s)
        seen["request_prefill_time_seconds"].observe(max(0.0, done.first_token_s - done.queue_s))
        seen["request_decode_time_seconds"].observe(decode)
        if num > 1:
            seen["request_time_per_output_token_seconds"].observe(decode / (num - 1))

    def _account(self, outcome: Outcome) -> None:
        spent = (outcome.prompt_tokens, outcome.completion_tokens)
        for adapter in _adapters_of(outcome.plan):
            label = self._adapters.use("/".join(adapter))
            key = _split(label) if label != OTHER else ("", OTHER)
            _add(self.by_adapter.setdefault(key, Usage()), *spent)
        tenant = self._tenants.use(outcome.caller.tenant)
        _add(self.by_tenant.setdefault(tenant, Usage()), *spent)

    def _drop_adapter(self, label: str) -> None:
        self.by_adapter.pop(_split(label), None)

    def _drop_tenant(self, label: str) -> None:
        self.by_tenant.pop(label, None)

    def _code(self, code: str) -> str:
        if code not in self._codes and len(self._codes) < MAX_CODES:
            self._codes.add(code)
        return code if code in self._codes else OTHER


def _adapters_of(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(tenant, name) of each part: versions come and go, a dashboard wants the adapter."""
    versions = plan.versions if plan.assembled is None else plan.assembled.versions.values()
    return tuple(dict.fromkeys((version.tenant, version.name) for version in versions))


def _choice(plan: Plan) -> str:
    if plan.retrieved is not None:
        return "auto"
    if plan.router is not None:
        return "router"
    return "base" if not plan.mix else "adapter" if len(plan.mix) == 1 else "mix"


def _split(label: str) -> tuple[str, str]:
    tenant, _, name = label.partition("/")
    return tenant, name


def _add(usage: Usage, prompt: int, generated: int) -> None:
    usage.requests += 1
    usage.prompt_tokens += prompt
    usage.generation_tokens += generated
