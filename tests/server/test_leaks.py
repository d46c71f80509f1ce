"""A thousand canaries (prompts, keys, sample texts, names, paths): where each of them may be found, and nowhere else.

The eavesdropper is another tenant with every scope; the log is read at its most talkative level.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.retrieval import ProfileStore, Retriever, follow
from loramux.server.app import create_app
from loramux.tenancy import Limits, Tenancy
from server.bases import World, make_world, zipped
from server.rig import LOCAL, config, stub_services

pytest.importorskip("opentelemetry.sdk")
ALL = ("infer", "adapters:read", "adapters:write", "admin")
COUNTS = {"prompt": 500, "key": 200, "sample": 240, "name": 20, "path": 60}
HOME = "canary-home-yranac"  # a folder of the server's own


class Canaries:
    """Words that nothing else says, by kind."""

    def __init__(self) -> None:
        self.made: dict[str, list[str]] = {kind: [] for kind in COUNTS}

    def new(self, kind: str) -> str:
        self.made[kind].append(f"canary{kind}{len(self.made[kind]):04d}yranac")
        return self.made[kind][-1]

    def found(self, text: str, *kinds: str) -> list[str]:
        return [word for kind in kinds for word in self.made[kind] if word in text]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("law", "tone"), versions=1)


@pytest.fixture
def rig(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    caplog.set_level(logging.DEBUG)  # before the database is opened: it would log its statements
    for name in (
        "httpx",
        "httpx2",
        "httpcore",
        "asyncio",
    ):  # the client of this test, not the server
        logging.getLogger(name).setLevel(logging.WARNING)
    home = tmp_path / HOME
    (home / "staging").mkdir(parents=True)
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with Registry.open(home / "registry") as registry:
        tenancy = Tenancy.open(registry.database)
        retriever = Retriever(base=world.shape.digest)
        ProfileStore.beside(registry)
        services = stub_services(
            registry=registry, tenancy=tenancy, base=world.shape, retriever=retriever,
            extras={
                "staging": home / "staging", "follower": follow(retriever, registry),
                "tracer_provider": provider,
            },
        )  # fmt: skip
        app = create_app(config(tenants={"enabled": True}, metrics={"tracing": True}), services)
        secrets = {}
        for tenant in ("ann", "bob"):
            tenancy.tenants.create(tenant, limits=Limits.none(), actor="test")
            secrets[tenant] = tenancy.keys.create(tenant, ALL, actor="test").secret

        def client(secret: str) -> TestClient:
            head = {"authorization": f"Bearer {secret}"}
            return TestClient(app, base_url=LOCAL, headers=head, raise_server_exceptions=False)

        yield SimpleNamespace(
            client=client,
            secrets=secrets,
            tenancy=tenancy,
            spans=spans,
            home=home,
            services=services,
        )
        tenancy.close()


def upload(served: TestClient, world: World, canaries: Canaries, folder: str, num: int) -> None:
    samples = [f"what about {canaries.new('sample')} number {i}" for i in range(num)]
    data = {"name": canaries.new("name"), "samples": json.dumps(samples)}
    files = {"file": ("a.zip", zipped(world.folder(folder)))}
    made = served.post("/v1/adapters", files=files, data=data)
    assert made.status_code == 201, made.text


def sing(rig: Any, world: World, canaries: Canaries) -> tuple[str, str]:
    """Use every kind of canary; (what ann was told, what bob was told)."""
    ann, bob = rig.client(rig.secrets["ann"]), rig.client(rig.secrets["bob"])
    told: dict[str, list[str]] = {"ann": [], "bob": []}

    def ask(who: str, response: Any) -> None:
        told[who].append(f"{response.status_code} {dict(response.headers)} {response.text}")

    upload(ann, world, canaries, "law", 120)
    upload(ann, world, canaries, "tone", 120)
    while len(canaries.made["name"]) < COUNTS["name"]:  # further names for the same content
        body = {"lora_name": canaries.new("name"), "lora_path": f"{canaries.made['name'][0]}@1"}
        assert ann.post("/v1/load_lora_adapter", json=body).status_code == 200
    own = canaries.made["name"]
    for i in range(COUNTS["prompt"] // 5):
        chat = [{"role": "user", "content": f"tell me {canaries.new('prompt')}"}]
        body = {"messages": chat, "max_tokens": 1, "stream": i % 3 == 0}
        ask("ann", ann.post("/v1/chat/completions", json={**body, "model": "auto"}))
        for more in ({"temperature": -1}, {"model": "nobody"}, {"stop": [canaries.new("prompt")]}):
            body = {"prompt": canaries.new("prompt"), "max_tokens": 1, "model": own[i % 20], **more}
            ask("ann", ann.post("/v1/completions", json=body))
        # Found out only once it runs: the engine's words are in the log.
        rig.services.engine.fail = "broken" if i % 4 == 0 else None
        ask("bob", bob.post("/v1/completions", json={"model": "auto", "prompt": "what about"}))
        guessed = bob.get(f"/v1/models/ann/{own[i % 20]}")
        assert guessed.status_code == 404 and guessed.text.count(own[i % 20]) == 1  # his own words
    for _ in range(COUNTS["key"]):
        wrong = rig.client(f"lmx_{canaries.new('key')}")
        ask("bob", wrong.get("/v1/models"))
    for _ in range(COUNTS["path"]):
        body = {"lora_name": "mine", "lora_path": f"/srv/{canaries.new('path')}/adapter"}
        ask("ann", ann.post("/v1/load_lora_adapter", json=body))
    for path in ("/v1/models", "/v1/adapters", "/metrics", "/version", "/openapi.json", "/ready"):
        ask("bob", bob.get(path))
        ask("ann", ann.get(path))
    return "\n".join(told["ann"]), "\n".join(told["bob"])


def test_a_thousand_canaries_are_found_only_where_they_belong(rig, world, caplog):
    canaries = Canaries()
    to_ann, to_bob = sing(rig, world, canaries)
    counted = {kind: len(made) for kind, made in canaries.made.items()}
    assert sum(counted.values()) >= 1000
    assert all(counted[kind] >= num for kind, num in COUNTS.items()), counted
    spans = "\n".join(span.to_json() for span in rig.spans.get_finished_spans())
    audit = "\n".join(rig.tenancy.audit.export())
    assert spans and audit and len(caplog.records) > 100
    said = ("prompt", "key", "sample")
    for place, text in {"log": caplog.text, "spans": spans, "audit": audit}.items():
        assert canaries.found(text, *said, "path") == [], place
        for secret in rig.secrets.values():
            assert secret.rsplit("_", 1)[1] not in text, place
    # What another tenant is told: nothing of ann's at all.
    assert canaries.found(to_bob, "prompt", "sample", "name", "path") == []
    # What the one who said it is told: the names are ann's own; neither texts nor folders of the server come back.
    assert canaries.found(to_ann, *said) == []
    for text in (to_ann, to_bob):
        assert HOME not in text and str(world.base.parent) not in text
    stored = b"".join(
        path.read_bytes() for path in sorted(rig.home.rglob("*")) if path.is_file()
    ).decode("latin-1")
    assert canaries.found(stored, *said, "path") == []
    assert canaries.made["name"][0] in stored  # so the files are those that would hold them
    shutil.rmtree(rig.home / "staging")
