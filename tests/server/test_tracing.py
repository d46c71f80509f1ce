"""Spans by OpenTelemetry's conventions, where asked for; without it nothing of it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.server.stub import StubEngine
from server.rig import client, stub_services

pytest.importorskip("opentelemetry.sdk")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {"messages": [{"role": "user", "content": "canary prompt"}], "max_tokens": 8}


@pytest.fixture
def exporter() -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def served(exporter: Any) -> TestClient:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    services = stub_services(engine=StubEngine(), extras={"tracer_provider": provider})
    return client(services, metrics={"tracing": True})


def test_a_call_is_a_span_under_the_caller_s_trace(served: TestClient, exporter: Any) -> None:
    reply = served.post(
        "/v1/chat/completions", json={"model": "law", **CHAT}, headers={"traceparent": PARENT}
    )
    [span] = exporter.get_finished_spans()
    trace_id = f"{span.context.trace_id:032x}"
    assert (
        trace_id == PARENT.split("-")[1] and f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    )
    assert reply.headers["traceparent"].split("-")[1] == trace_id
    usage = reply.json()["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "loramux",
        "gen_ai.request.model": "local/law@1",
        "gen_ai.response.model": "local/law@1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.request.max_tokens": 8,
        "http.response.status_code": 200,
    }
    assert expected.items() <= dict(span.attributes).items()
    assert reply.json()["id"].endswith(span.attributes["gen_ai.response.id"])
    digest = reply.json()["loramux"]["adapters"][0]["digest"]
    assert span.attributes["loramux.adapter.digests"] == (digest,)


def test_streams_and_several_calls_have_spans_of_their_own(
    served: TestClient, exporter: Any
) -> None:
    for model in ("law", "tone"):
        served.post("/v1/chat/completions", json={"model": model, "stream": True, **CHAT})
    served.post("/v1/completions", json={"model": "law", "prompt": "x", "max_tokens": 2})
    served.get("/v1/models")
    spans = exporter.get_finished_spans()
    assert [span.attributes["gen_ai.operation.name"] for span in spans] == [
        *("chat", "chat", "text_completion"),
    ]
    assert [span.attributes["gen_ai.request.model"] for span in spans] == [
        *("local/law@1", "local/tone@1", "local/law@1"),
    ]
    assert len({span.context.trace_id for span in spans}) == 3
    assert all(span.attributes["gen_ai.usage.output_tokens"] > 0 for span in spans)


def test_nothing_that_was_said_is_in_a_span(served: TestClient, exporter: Any) -> None:
    served.post("/v1/chat/completions", json={"model": "law", "stop": ["canary stop"], **CHAT})
    served.post("/v1/chat/completions", json={"model": "canary model", **CHAT})
    said = [span.to_json() for span in exporter.get_finished_spans()]
    assert len(said) == 2 and "canary" not in json.dumps(said)


def test_a_malformed_traceparent_starts_a_new_trace(served: TestClient, exporter: Any) -> None:
    for given in ("", "x" * 10_000, "00-0-0-0", PARENT.upper(), "ff" + PARENT[2:]):
        reply = served.post(
            "/v1/completions",
            json={"model": "law", "prompt": "x", "max_tokens": 2},
            headers={"traceparent": given},
        )
        assert reply.status_code == 200
    assert all(span.parent is None for span in exporter.get_finished_spans())


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.startswith("opentelemetry.sdk"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
from loramux.server.app import create_app
from loramux.server.config import parse_config
from loramux.server.services import Services
from loramux.server.stub import StubEngine, StubTokenizer
def make(**metrics):
    config = parse_config({"base": "pico", "metrics": metrics})
    return create_app(config, Services(StubEngine(), None, StubTokenizer()))
make()
# FastAPI itself imports the API.
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
try:
    make(tracing=True)
except ValueError as error:
    print(error)
"""


def test_without_the_extra_a_server_starts_and_tracing_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'loramux[otel]'" in done.stdout
