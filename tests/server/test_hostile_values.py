"""Values that are right by their type and break what handles them: lone surrogates, NaN, endless nesting, odd names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.retrieval import Retriever
from loramux.server.app import create_app
from server.bases import World, make_world, zipped
from server.rig import LOCAL, config, error_of, stub_services

CALLS = (
    '{"model": "pico", "prompt": "\\ud800"}',
    '{"model": "\\ud800", "prompt": "x"}',
    '{"model": "pico", "prompt": "x", "\\ud800": 1}',
    '{"model": "pico", "prompt": "x", "stop": "\\ud800"}',
    '{"model": "pico", "prompt": ["a", "\\udfff"]}',
    '{"model": "pico", "prompt": "x", "temperature": NaN}',
    '{"model": "pico", "prompt": "x", "min_p": Infinity}',
    '{"model": "pico", "prompt": "x", "max_tokens": %s}' % ("9" * 5000),
    '{"model": "pico", "prompt": "x", "metadata": %s}' % ("[" * 50_000),
    '{"model": "pico*1e999", "prompt": "x"}',
    '{{"model": "{}", "prompt": "x"}}'.format("+".join(["a*1"] * 500)),
)
METADATA = (
    '{"a": NaN}', '{"a": [Infinity]}', '{"a": "\\ud800"}', '{"\\ud800": 1}', '{"a": "\\u0000"}',
    '{"a": 1e999}', '{"a": %s}' % ("9" * 400), '{{"a": {}1{}}}'.format("[" * 900, "]" * 900),
    json.dumps({"a": "x" * 200_000}),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("law",), versions=1)


@pytest.fixture
def served(world: World, tmp_path: Path) -> Iterator[TestClient]:
    with Registry.open(tmp_path / "registry") as registry:
        services = stub_services(
            registry=registry, base=world.shape, retriever=Retriever(base=world.shape.digest)
        )
        app = create_app(config(), services)
        yield TestClient(app, base_url=LOCAL, raise_server_exceptions=False)


@pytest.mark.parametrize("body", CALLS, ids=lambda body: body[:60])
def test_a_call_with_a_broken_value_is_refused(served: TestClient, body: str) -> None:
    head = {"Content-Type": "application/json"}
    answer = served.post("/v1/completions", content=body.encode(), headers=head)
    assert answer.status_code in (400, 404), answer.text[:300]
    error_of(answer, answer.status_code)


@pytest.mark.parametrize("field", ["metadata", "provenance"])
@pytest.mark.parametrize("value", METADATA, ids=lambda value: value[:30])
def test_what_is_kept_with_an_adapter_can_always_be_shown(
    served: TestClient, world: World, field: str, value: str
) -> None:
    """One value that cannot be written as JSON would end every list that it is in."""
    files = {"file": ("a.zip", zipped(world.folder("law")))}
    made = served.post("/v1/adapters", files=files, data={"name": "law", field: value})
    assert made.status_code in (201, 400), made.text[:300]
    for path in ("/v1/adapters", "/v1/models", "/v1/adapters/law", "/v1/adapters/law/versions"):
        assert served.get(path).status_code in (200, 404), path
    kept = served.get("/v1/adapters").json()["data"]
    assert len(kept) == (made.status_code == 201)


@pytest.mark.parametrize("sample", ["\\ud800", "\\u0000", " ", "x" * 100_000])
def test_broken_sample_prompts_are_refused_or_read(
    served: TestClient, world: World, sample: str
) -> None:
    samples = "[" + ",".join([f'"{sample}"'] * 12) + "]"
    files = {"file": ("a.zip", zipped(world.folder("law")))}
    made = served.post("/v1/adapters", files=files, data={"name": "law", "samples": samples})
    assert made.status_code in (201, 400), made.text[:300]


@pytest.mark.parametrize("name", ["модель", "a\nb", "模型 x", "é", "a\x1b[2Jb"])
def test_a_base_of_any_name_answers(name: str) -> None:
    app = create_app(config(model_name=name), stub_services())
    client = TestClient(app, base_url=LOCAL, raise_server_exceptions=False)
    for stream in (False, True):
        body = {"model": name, "prompt": "x", "stream": stream}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        said: Any = answer.headers["x-loramux-adapter"]
        assert said.isascii() and said.isprintable()
