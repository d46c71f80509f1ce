"""Metrics: vLLM's names, bounded labels, and nobody else's names."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loramux.engine.request import Answered, Completion, SamplingParams
from loramux.server.labels import OTHER, TopLabels
from loramux.server.meters import Metrics
from loramux.server.metrics import render, viewer_of
from loramux.server.resolve import Plan
from loramux.server.services import Outcome
from server.rig import client, stub_services

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
# What dashboards for vLLM and the Gateway API Inference Extension read, with its labels.
VLLM = {
    "vllm:num_requests_running": {"model_name", "engine"},
    "vllm:num_requests_waiting": {"model_name", "engine"},
    "vllm:kv_cache_usage_perc": {"model_name", "engine"},
    "vllm:num_preemptions": {"model_name", "engine"},
    "vllm:prompt_tokens": {"model_name", "engine"},
    "vllm:generation_tokens": {"model_name", "engine"},
    "vllm:prefix_cache_queries": {"model_name", "engine"},
    "vllm:prefix_cache_hits": {"model_name", "engine"},
    "vllm:request_success": {"model_name", "engine", "finished_reason"},
    "vllm:time_to_first_token_seconds": {"model_name", "engine"},
    "vllm:inter_token_latency_seconds": {"model_name", "engine"},
    "vllm:request_time_per_output_token_seconds": {"model_name", "engine"},
    "vllm:e2e_request_latency_seconds": {"model_name", "engine"},
    "vllm:request_queue_time_seconds": {"model_name", "engine"},
    "vllm:request_inference_time_seconds": {"model_name", "engine"},
    "vllm:request_prefill_time_seconds": {"model_name", "engine"},
    "vllm:request_decode_time_seconds": {"model_name", "engine"},
    "vllm:request_prompt_tokens": {"model_name", "engine"},
    "vllm:request_generation_tokens": {"model_name", "engine"},
    "vllm:lora_requests_info": {"max_lora", "waiting_lora_adapters", "running_lora_adapters"},
}


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value_of(text: str, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def plan_of(*names: str, **more: Any) -> Plan:
    """A plan of adapters "tenant/name"."""
    versions = tuple(
        SimpleNamespace(tenant=name.split("/")[0], name=name.split("/")[1], ref=f"{name}@1")
        for name in names
    )
    mix = tuple((f"digest of {name}", 1.0 / len(names)) for name in names)
    return Plan("+".join(names) or "pico", mix, versions, **more)


def outcome(call_id: str, plan: Plan, tenant: str, tokens: int = 3, **more: Any) -> Outcome:
    done = Completion(
        request_id=call_id, index=0, tenant=tenant, text="", token_ids=(1,) * tokens, finish_reason="stop",
        answered=Answered("b"), prompt_tokens=4, cached_tokens=2, queue_s=0.1, first_token_s=0.3, total_s=0.7,
    )  # fmt: skip
    caller = SimpleNamespace(tenant=tenant, key_id="k")
    values = {"failure": None, "completions": (done,)} | more
    return Outcome(
        id=call_id, created=0, caller=caller, plan=plan, prompts=((1, 2, 3, 4),),
        params=SamplingParams(max_tokens=8), debit=4 + tokens, **values,
    )  # fmt: skip


def finish(metrics: Metrics, plan: Plan, tenant: str, call_id: str = "call") -> None:
    metrics.admitted(call_id, plan, SimpleNamespace(tenant=tenant))
    metrics.delta(call_id, 1)
    metrics.finished(outcome(call_id, plan, tenant))


def page(metrics: Metrics, viewer: str | None) -> str:
    return render(metrics, None, viewer, generate_latest).decode()


# --- Names and values -------------------------------------------------------------------------------


def test_the_page_has_vllm_s_names_and_labels() -> None:
    served = client()
    for body in ({"model": "law"}, {"model": "law*0.5+tone*0.5"}, {"model": "pico"}):
        assert served.post("/v1/chat/completions", json={**body, **CHAT}).status_code == 200
    reply = served.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found = families(reply.text)
    assert set(VLLM) <= set(found)
    for name, labels in VLLM.items():
        own = [set(sample.labels) - {"le"} for sample in found[name].samples]
        assert own and all(names == labels for names in own), name


def test_requests_tokens_and_times_are_counted_once() -> None:
    served = client()
    asked = {"model": "law", "max_tokens": 5, "prompt": ["four", "five5"], "n": 2}
    usage = served.post("/v1/completions", json=asked).json()["usage"]
    text = served.get("/metrics").text
    assert value_of(text, "vllm:prompt_tokens_total") == usage["prompt_tokens"] == 9
    assert value_of(text, "vllm:generation_tokens_total") == usage["completion_tokens"]
    assert value_of(text, "vllm:time_to_first_token_seconds_count") == 1
    assert value_of(text, "vllm:e2e_request_latency_seconds_count") == 4
    assert value_of(text, "vllm:request_success_total", finished_reason="length") == 4
    assert value_of(text, "loramux_routing_total", choice="adapter") == 1
    assert value_of(text, "loramux_adapter_requests_total", adapter="law") == 1
    assert (
        value_of(text, "loramux_http_responses_total", route="/v1/completions", status="200") == 1
    )


def test_phases_of_a_request_add_up() -> None:
    metrics = Metrics("pico")
    finish(metrics, plan_of("ann/law"), "ann")
    text = page(metrics, None)
    sums = {
        name: value_of(text, f"vllm:request_{name}_time_seconds_sum")
        for name in ("queue", "prefill", "decode", "inference")
    }
    assert sums == pytest.approx({"queue": 0.1, "prefill": 0.2, "decode": 0.4, "inference": 0.6})
    assert value_of(text, "vllm:prefix_cache_hits_total") == 2


def test_gaps_between_tokens_count_for_single_samples_only() -> None:
    now = [0.0]
    metrics = Metrics("pico", clock=lambda: now[0])
    for call_id, num in (("one", 1), ("two", 2)):
        metrics.admitted(call_id, plan_of("ann/law"), SimpleNamespace(tenant="ann"))
        for _ in range(3):
            now[0] += 0.2
            metrics.delta(call_id, 1)
        end = outcome(call_id, plan_of("ann/law"), "ann")
        done = end.completions * num
        metrics.finished(outcome(call_id, plan_of("ann/law"), "ann", completions=done))
    text = page(metrics, None)
    assert value_of(text, "vllm:inter_token_latency_seconds_count") == 2
    assert value_of(text, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.4)
    assert value_of(text, "vllm:time_to_first_token_seconds_count") == 2


def test_the_lora_gauge_shows_who_runs_and_who_waits_and_when() -> None:
    metrics = Metrics("pico", max_lora=7)
    caller = SimpleNamespace(tenant="local")
    metrics.admitted("a", plan_of("local/law", "local/tone"), caller)
    metrics.delta("a", 1)
    metrics.admitted("b", plan_of("local/code"), caller)
    [sample] = families(page(metrics, None))["vllm:lora_requests_info"].samples
    assert sample.labels == {
        "max_lora": "7", "running_lora_adapters": "law,tone", "waiting_lora_adapters": "code",
    }  # fmt: skip
    assert abs(sample.value - time.time()) < 60
    for call_id in ("a", "b"):
        metrics.finished(outcome(call_id, plan_of(), "local", failure="overloaded", completions=()))
    [sample] = families(page(metrics, None))["vllm:lora_requests_info"].samples
    assert sample.labels["running_lora_adapters"] == sample.labels["waiting_lora_adapters"] == ""


def test_a_request_under_way_is_seen_while_it_runs() -> None:
    from loramux.server.stub import StubEngine

    services = stub_services(engine=StubEngine(delay_s=0.15))
    served = client(services)
    ask = threading.Thread(
        target=lambda: client(services).post("/v1/chat/completions", json={"model": "law", **CHAT})
    )
    ask.start()
    seen = set()
    while ask.is_alive():
        tracks = services.extras["metrics"].tracks.values()
        seen |= {adapter for track in list(tracks) for adapter in track.adapters}
        time.sleep(0.02)
    assert seen == {("local", "law")} and served is not None


def test_failures_have_a_code_and_codes_are_bounded() -> None:
    metrics = Metrics("pico")
    for i in range(500):
        end = outcome(str(i), plan_of(), "ann", failure=f"code_{i}", completions=())
        metrics.finished(end)
    samples = families(page(metrics, None))["loramux_failures"].samples
    values = [sample for sample in samples if sample.name == "loramux_failures_total"]
    assert len(values) == 65 and sum(sample.value for sample in values) == 500


def test_a_failed_engine_leaves_the_page_and_says_so() -> None:
    services = stub_services()

    async def call(_: Any) -> Any:
        raise RuntimeError("a step failed")

    services.engine.call = call  # type: ignore[method-assign]
    text = client(services).get("/metrics").text
    assert value_of(text, "loramux_engine_up") == 0
    assert "vllm:num_requests_running{" not in text


def test_unknown_paths_do_not_become_labels() -> None:
    served = client()
    for i in range(50):
        served.get(f"/{i}")
        served.get(f"/v1/adapters/x{i}")
    routes = {
        sample.labels["route"]
        for sample in families(served.get("/metrics").text)["loramux_http_responses"].samples
    }
    assert routes <= {"unmatched", "/v1/adapters/{name}", "/metrics"}


# --- Labels -----------------------------------------------------------------------------------------


def test_ten_thousand_adapters_and_tenants_stay_within_the_label_budget() -> None:
    metrics = Metrics("pico", top=20)
    draw = random.Random(0)
    for i in range(10_000):
        finish(metrics, plan_of(f"t{i}/a{i}"), f"t{i}")
        if draw.random() < 0.5:
            finish(metrics, plan_of("big/hot"), "big")
    text = page(metrics, None)
    series = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(series) < 1000
    named = {
        sample.labels["adapter"]
        for sample in families(text)["loramux_adapter_requests"].samples
        if sample.name.endswith("_total")
    }
    assert len(named) <= 21 and {OTHER, "hot"} <= named


def test_the_busy_names_get_the_labels_and_no_count_ever_falls() -> None:
    labels = TopLabels(5)
    draw = random.Random(1)
    for i in range(5):
        labels.use(f"early-{i}")
    counted: dict[str, int] = {}
    for i in range(20_000):
        name = f"hot-{draw.randrange(5)}" if draw.random() < 0.7 else f"cold-{i}"
        label = labels.use(name)
        counted[label] = counted.get(label, 0) + 1
    assert labels.names == [f"hot-{i}" for i in range(5)]
    assert sum(counted.values()) == 20_000


def test_without_labels_everything_is_other() -> None:
    assert {TopLabels(0).use(str(i)) for i in range(10)} == {OTHER}


# --- Who sees what ----------------------------------------------------------------------------------


def test_a_tenant_sees_totals_and_no_foreign_name() -> None:
    metrics = Metrics("pico")
    finish(metrics, plan_of("ann/secret-merger", "bob/tax"), "ann", "one")
    finish(metrics, plan_of("bob/tax"), "bob", "two")
    metrics.admitted("three", plan_of("ann/secret-merger"), SimpleNamespace(tenant="ann"))
    metrics.admitted("four", plan_of("bob/tax"), SimpleNamespace(tenant="bob"))
    bob = page(metrics, "bob")
    assert "ann" not in bob and "secret-merger" not in bob
    assert value_of(bob, "vllm:generation_tokens_total") == 6
    assert value_of(bob, "loramux_adapter_requests_total", adapter="tax") == 2
    assert value_of(bob, "loramux_tenant_requests_total", tenant="bob") == 1
    assert 'waiting_lora_adapters="bob/tax"' in bob
    nobody = page(metrics, "")
    assert "ann" not in nobody and "bob" not in nobody
    everything = page(metrics, None)
    assert "secret-merger" in everything and "bob/tax" in everything


def test_only_the_operator_sees_everybody_s_names() -> None:
    services = stub_services()
    ann = SimpleNamespace(tenant="ann")
    assert viewer_of(services, ann, ()) is None  # no keys: one user
    services.tenancy = object()
    assert viewer_of(services, ann, ("bob",)) == "ann"
    assert viewer_of(services, None, ("ann",)) == ""
    assert viewer_of(services, ann, ("ann",)) is None


def test_metrics_can_be_turned_off() -> None:
    served = client(metrics={"enabled": False})
    assert served.get("/metrics").status_code == 404
    assert served.post("/v1/chat/completions", json={"model": "law", **CHAT}).status_code == 200


def test_ten_thousand_calls_are_counted_in_seconds() -> None:
    metrics = Metrics("pico")
    plans = [plan_of(f"t{i}/a{i}") for i in range(1000)]
    spent = time.process_time()
    for i in range(10_000):
        finish(metrics, plans[i % 1000], f"t{i % 1000}", str(i))
    assert time.process_time() - spent < 4.0  # about 0.5 on an idle machine
    assert not metrics.tracks
