"""`GET /metrics`: what is counted, as Prometheus text, with only those names that the one who looks may know.

Who looks: the operator (the one user of a server without keys, or a tenant of `metrics.operators`) sees all names that
have a label; any other key the totals, and the names of its own tenant; nobody without a key, or the totals alone
(`metrics.public`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

from loramux.server.auth import CallerDep, ServicesDep
from loramux.server.errors import ApiError
from loramux.server.meters import ENGINE, LABELS, Metrics, Usage
from loramux.server.services import Services

KEY = "metrics"  # of Services.extras
STATS_TIMEOUT_S = 2.0
LOCAL = "local"
# name -> (documentation, path in the engine's statistics)
_GAUGES: Mapping[str, tuple[str, tuple[str, str]]] = {
    "loramux_adapter_names": ("Adapters the engine knows.", ("adapters", "num_names")),
    "loramux_adapters_resident": ("Contents in memory.", ("adapters", "num_contents")),
    "loramux_adapter_slots_used": ("Slots that hold an expert.", ("adapters", "num_slots_used")),
    "loramux_adapter_slots_pinned": ("Slots in use by requests.", ("adapters", "num_slots_pinned")),
    "loramux_adapter_pins": ("Contents pinned by requests.", ("adapters", "num_leases")),
    "loramux_adapter_load_seconds": ("Time of the last load.", ("adapters", "last_load_s")),
}
_TIERS = {
    "memory": ("memory_bytes", "num_memory_evictions"),
    "slots": ("slot_bytes", "num_slot_evictions"),
}


def router() -> APIRouter:
    """GET /metrics."""
    routes = APIRouter(tags=["metrics"])

    @routes.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics(request: Request, services: ServicesDep, caller: CallerDep) -> Response:
        counted = services.extras.get(KEY)
        if counted is None:
            raise ApiError("this server keeps no metrics", code="not_found")
        stats = await engine_stats(services)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        viewer = viewer_of(services, caller, request.app.state.config.metrics.operators)
        page = render(counted, stats, viewer, encode)
        return Response(page, media_type=content_type)

    return routes


def viewer_of(services: Services, caller: Any, operators: Sequence[str]) -> str | None:
    """The tenant that looks; None for the operator."""
    if caller is None:
        return ""  # a public page: totals alone
    if services.tenancy is None or caller.tenant in operators:
        return None
    return str(caller.tenant)


async def engine_stats(services: Services) -> dict[str, Any] | None:
    """The engine's own numbers; None where it does not answer."""
    try:
        asked = services.engine.call(lambda engine: engine.stats())
        return dict(await asyncio.wait_for(asked, STATS_TIMEOUT_S))
    except Exception:  # an engine that failed must not take its own alarm with it
        return None


def render(
    metrics: Metrics, stats: Mapping[str, Any] | None, viewer: str | None, encode: Any
) -> bytes:
    """The page. `viewer`: whose names are shown; None: everybody's."""
    return bytes(encode(_Page(metrics, stats, viewer)))


class _Page:
    """Looks like a registry to an encoder; made for one scrape."""

    def __init__(
        self, metrics: Metrics, stats: Mapping[str, Any] | None, viewer: str | None
    ) -> None:
        self._metrics, self._stats, self._viewer = metrics, stats, viewer

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.registry.collect()
        yield _gauge(
            "loramux_engine_up", "Whether the engine answers.", float(self._stats is not None)
        )
        if self._stats is not None:
            yield from self._of_the_engine(self._stats)
        yield self._lora_info()
        yield from self._by_adapter()
        yield from self._by_tenant()

    def _of_the_engine(self, stats: Mapping[str, Any]) -> Iterator[Metric]:
        scheduler, blocks = stats["scheduler"], stats["kv_blocks"]
        used = blocks - stats["kv_blocks_free"]
        yield self._vllm("num_requests_running", "Samples in the batch.", scheduler["num_running"])
        yield self._vllm("num_requests_waiting", "Samples that wait.", scheduler["num_waiting"])
        yield self._vllm(
            "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used / max(1, blocks)
        )
        preempted = CounterMetricFamily(
            "vllm:num_preemptions", "Samples that gave back their blocks.", labels=LABELS
        )
        preempted.add_metric(self._labels, scheduler.get("num_preemptions", 0))
        yield preempted
        for name, (text, (group, key)) in _GAUGES.items():
            if key in stats.get(group, {}):
                yield _gauge(name, text, stats[group][key])
        yield from _tiers(stats.get("adapters", {}))

    def _lora_info(self) -> Metric:
        """One series whatever runs; its value is the time of the scrape, as in vLLM."""
        running: dict[str, None] = {}
        waiting: dict[str, None] = {}
        for track in self._metrics.tracks.values():
            place = waiting if track.last is None else running
            place.update(dict.fromkeys(self._shown(track.adapters)))
        most = max(1, self._metrics.top)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of requests that run and that wait.",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        values = [",".join(sorted(names)[:most]) for names in (waiting, running)]
        info.add_metric([str(self._metrics.max_lora), *values], time.time())
        return info

    def _shown(self, adapters: Iterable[tuple[str, str]]) -> Iterator[str]:
        for tenant, name in adapters:
            if self._may_see(tenant):
                yield name if tenant == LOCAL else f"{tenant}/{name}"

    def _may_see(self, tenant: str) -> bool:
        """ "" is the owner of `other`, which is the sum of many."""
        return self._viewer is None or (tenant != "" and tenant == self._viewer)

    def _by_adapter(self) -> Iterator[Metric]:
        rows = [
            (list(key), usage)
            for key, usage in sorted(self._metrics.by_adapter.items())
            if self._may_see(key[0])
        ]
        yield from _usage("loramux_adapter", "of an adapter", ("tenant", "adapter"), rows)

    def _by_tenant(self) -> Iterator[Metric]:
        rows = [
            ([tenant], usage)
            for tenant, usage in sorted(self._metrics.by_tenant.items())
            if self._may_see(tenant)
        ]
        yield from _usage("loramux_tenant", "of a tenant", ("tenant",), rows)

    @property
    def _labels(self) -> list[str]:
        return [self._metrics.model_name, ENGINE]

    def _vllm(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _tiers(adapters: Mapping[str, Any]) -> Iterator[Metric]:
    held = GaugeMetricFamily("loramux_adapter_bytes", "Bytes of adapters.", labels=("tier",))
    evicted = CounterMetricFamily(
        "loramux_adapter_evictions", "Adapters put out.", labels=("tier",)
    )
    loads = CounterMetricFamily("loramux_adapter_loads", "Adapters read.", labels=("result",))
    for tier, (size, evictions) in _TIERS.items():
        held.add_metric([tier], adapters.get(size, 0))
        evicted.add_metric([tier], adapters.get(evictions, 0))
    loads.add_metric(["ok"], adapters.get("num_loads", 0))
    loads.add_metric(["failed"], adapters.get("num_failed_loads", 0))
    yield from (held, evicted, loads)


def _usage(
    name: str, of: str, labels: tuple[str, ...], rows: Iterable[tuple[list[str], Usage]]
) -> Iterator[Metric]:
    requests = CounterMetricFamily(f"{name}_requests", f"Calls {of}.", labels=labels)
    tokens = CounterMetricFamily(f"{name}_tokens", f"Tokens {of}.", labels=(*labels, "kind"))
    for values, usage in rows:
        requests.add_metric(values, usage.requests)
        tokens.add_metric([*values, "prompt"], usage.prompt_tokens)
        tokens.add_metric([*values, "generation"], usage.generation_tokens)
    yield from (requests, tokens)
