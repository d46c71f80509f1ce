"""An adapter that passed the checks and turns out at its first use to belong to another base."""

from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

import loramux
from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.server.app import create_app
from loramux.server.services import Services
from pico import build_pico, pico_tokenizer
from server.rig import LOCAL, FolderRegistry, config, error_of

ASK = {"model": "router:stray", "prompt": "hello", "max_tokens": 2, "temperature": 0}


@pytest.fixture
def served(tmp_path) -> Any:
    """A server over one base, with mixtures of it and of another, neither of which lay in a folder then."""
    registry = FolderRegistry()
    for name, seed in (("own", 0), ("stray", 1)):
        model: Any = build_pico("llama", seed=seed)
        handle = loramux.attach(model, loramux.MiLoRAConfig(r=2))
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.add_(0.1)
        handle.save(tmp_path / name)
        registry.add_folder("local", name, tmp_path / name, servability="prompt_routed")
    engine = Engine(build_pico("llama"), pico_tokenizer(), kv_memory="4MiB", fuse=False)
    services = Services(
        engine=AsyncEngine(engine), registry=registry, tokenizer=pico_tokenizer(),
        max_length=engine.max_length,
    )  # fmt: skip
    with TestClient(create_app(config(), services), base_url=LOCAL) as http:
        yield http


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "stream"])
def test_an_adapter_of_another_base_is_the_caller_s_error_and_says_so(served, more):
    error = error_of(served.post("/v1/completions", json={**ASK, **more}), 400)
    assert error["code"] == "wrong_base" and error["param"] == "model"
    assert "another base model" in error["message"] and "/" not in error["message"]
    own = served.post("/v1/completions", json={**ASK, "model": "router:own"})
    assert own.status_code == 200, own.text
