"""`router:ramole`: retrieved adapters under a trained router, in the same engine as everything else."""

import random
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.helpers import plain_logits
from loramux import LoraConfig, attach
from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.persist.ramole import assemble
from loramux.retrieval import Retriever, make_profile
from loramux.server.app import create_app
from loramux.server.ramole import RamoleRouter
from loramux.server.services import Services
from methods.ramole_case import routed
from pico import build_pico, pico_tokenizer
from server.rig import LOCAL, FolderRegistry, config, error_of

WORDS = {"red": "court judge lease", "green": "oven sugar flour", "blue": "loop array compile"}


@pytest.fixture
def served(tmp_path) -> Any:
    made = routed(tmp_path / "trained", std=0.2, ranks=(4, 2, 3), double=False)
    router = made.handle.save(tmp_path / "router")
    registry, retriever = FolderRegistry(), Retriever(min_score=0.05)
    draw = random.Random(1)
    folders = {}
    for (name, words), folder in zip(WORDS.items(), made.folders, strict=True):
        version = registry.add_folder("local", name, folder)
        folders[version.digest] = folder
        samples = [" ".join(draw.sample(words.split(), 3)) for _ in range(12)]
        retriever.upsert(version.ref, make_profile(samples), owner="local")
    engine = Engine(build_pico("llama"), pico_tokenizer(), kv_memory="4MiB", fuse=False)
    services = Services(
        engine=AsyncEngine(engine), registry=registry, tokenizer=pico_tokenizer(),
        max_length=engine.max_length, retriever=retriever,
    )  # fmt: skip
    services.extras["ramole"] = RamoleRouter(router)
    with TestClient(create_app(config(), services), base_url=LOCAL) as http:
        yield http, services, folders, router


def test_the_set_answers_as_the_assembled_adapter_and_is_listed_without_weights(served):
    http, services, folders, router = served
    asked = {
        "model": "router:ramole",
        "prompt": "the judge",
        "temperature": 0,
        "max_tokens": 5,
        "ignore_eos": True,
    }
    body = http.post("/v1/completions", json=asked).json()
    assert body["model"] == "router:ramole" and body["loramux"]["router"] == "ramole"
    parts = body["loramux"]["adapters"]
    assert {part["digest"] for part in parts} == set(folders) and {p["weight"] for p in parts} == {
        None
    }
    assert len(body["loramux"]["routing"]["chosen"]) == 3
    model: Any = build_pico("llama")
    adapter = assemble(model, folders, router, name="set")
    handle = attach(model, LoraConfig(r=2), name="other")
    handle.put(adapter)
    handle.use("set")
    tokens = pico_tokenizer()("the judge")["input_ids"]
    start = len(tokens)
    for _ in range(5):
        tokens.append(int(plain_logits(model, tokens, len(tokens))[0].argmax()))
    assert body["choices"][0]["text"] == pico_tokenizer().decode(
        tokens[start:], skip_special_tokens=True
    )
    again = http.post("/v1/completions", json=asked).json()
    assert again["choices"] == body["choices"] and len(services.extras["ramole"].pool) == 1


def test_where_nothing_fits_the_base_answers(served):
    body = (
        served[0].post("/v1/completions", json={"model": "router:ramole", "prompt": "zebra"}).json()
    )
    assert body["model"] == "pico" and body["loramux"]["routing"]["abstained"]


def test_without_a_trained_router_the_name_is_unknown(served):
    http, services, *_ = served
    del services.extras["ramole"]
    response = http.post("/v1/completions", json={"model": "router:ramole", "prompt": "the judge"})
    assert error_of(response, 404)["code"] == "model_not_found"
