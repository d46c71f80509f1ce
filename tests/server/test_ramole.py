"""`router:ramole`: retrieved adapters under a trained router, in the same engine as everything else."""

import asyncio
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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

USER = SimpleNamespace(tenant="local")
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


def test_what_cannot_be_an_expert_is_left_out_and_the_others_answer(served, tmp_path):
    http, services, folders, _ = served
    registry, retriever = services.registry, services.retriever
    model: Any = build_pico("llama")
    odd = attach(model, LoraConfig(r=2, use_dora=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    dora = registry.add_folder("zoo", "dora", odd.save(tmp_path / "dora"), visibility="shared")
    samples = [f"court judge lease {n}" for n in range(12)]
    retriever.upsert(dora.ref, make_profile(samples), owner="zoo", tags={"readers": ("*",)})
    for _ in range(2):
        body = http.post(
            "/v1/completions",
            json={"model": "router:ramole", "prompt": "the judge", "max_tokens": 2},
        ).json()
        digests = {part["digest"] for part in body["loramux"]["adapters"]}
        assert digests and digests <= set(folders)
        assert dora.ref in {hit["ref"] for hit in body["loramux"]["routing"]["runners_up"]}


def test_a_client_that_leaves_while_a_set_is_registered_does_not_keep_it_held(served, monkeypatch):
    _, services, _, _ = served
    pool = services.extras["ramole"].pool
    entered = threading.Event()
    hold = pool.hold

    def slow(*given: Any) -> str:
        entered.set()
        time.sleep(0.2)
        return hold(*given)

    monkeypatch.setattr(pool, "hold", slow)

    async def main() -> None:
        plan = await services.extras["ramole"](services, config(), "the judge", USER)

        async def use() -> None:
            async with plan.assembled.held(services):
                raise AssertionError("the client has left by then")

        using = asyncio.ensure_future(use())
        await asyncio.to_thread(entered.wait, 5)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using

    asyncio.run(main())
    assert len(pool) == 1 and not any(pool._held.values())


def test_without_room_for_the_set_the_call_is_told_to_come_again(served, monkeypatch):
    http, services, *_ = served

    def full(*_: Any) -> str:
        raise ValueError("adapter 'x' takes 9 bytes of /srv/secret")

    monkeypatch.setattr(services.extras["ramole"].pool, "hold", full)
    response = http.post("/v1/completions", json={"model": "router:ramole", "prompt": "the judge"})
    assert error_of(response, 503)["code"] == "overloaded" and "secret" not in response.text
    assert response.headers["retry-after"] == "1"


def test_what_another_call_pushed_out_of_memory_meanwhile_is_judged_all_the_same(
    served, monkeypatch
):
    """Regression: beyond the limit a judgement could be gone before its own call read it."""
    _, services, *_ = served
    router = services.extras["ramole"]
    monkeypatch.setattr("loramux.server.ramole.MAX_JUDGED", 1)
    versions = list(services.registry.visible("local"))
    assert len(versions) == 3

    async def main():
        return await asyncio.gather(*(router._judge(services, versions[n:]) for n in (0, 1, 2, 0)))

    assert asyncio.run(main()) == [[True] * 3, [True] * 2, [True], [True] * 3]
    assert len(router._fits) == 1
