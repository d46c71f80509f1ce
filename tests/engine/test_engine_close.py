"""An engine takes a model as it is and gives it back as it was; engines over one set of weights do not meet."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.cases import Maker, every_variant, logits_of, trace
from engine.crowd import build_engine, greedy, random_prompt, save_variants
from engine.helpers import (
    assert_idle,
    assert_like_plain,
    merged,
    record_samples,
    run_all,
    write_peft,
)
from loramux.engine import attention, parts, store, wiring
from loramux.engine.engine import Engine
from pico import FAMILIES, build_pico


def everything(model: Any) -> dict[str, Any]:
    """What an engine could leave behind, by identity."""
    configs = [model.config, model.config.get_text_config()]
    return {
        **trace(model),
        "attention": [config._attn_implementation for config in configs],
        "storage": {name: p.data_ptr() for name, p in model.named_parameters()},
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "class": {name: type(module) for name, module in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything(model)
    weights, old = after.pop("weights"), before["weights"]
    assert all(torch.equal(weights[name], old[name]) for name in old)
    for key, value in after.items():
        assert value == before[key], key


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("close")
    found = {name: write_peft(root / name, seed=i) for i, name in enumerate(["a", "b"])}
    wanted = ("milora-ste", "mixlora-top2", "mixlora-dynamic", "mole-layer", "mole-matrix")
    chosen = [variant for variant in every_variant() if variant.name in wanted]
    return {**found, **save_variants(Maker(root / "experts"), root, chosen, "llama")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_engine_leaves_the_model_as_it_was(family: str):
    model = build_pico(family)
    before, logits = everything(model), logits_of(model)
    engine = build_engine(family, model, fuse=True)
    engine.generate([greedy(random_prompt(random.Random(0)), None, 4) for _ in range(3)])
    engine.close()
    assert_same(model, before)
    assert torch.equal(logits_of(model), logits)
    engine.close()  # a second time is no error
    with pytest.raises(ValueError, match="closed"):
        engine.add_request(greedy([5]))


def test_an_engine_closed_in_the_middle_of_work_leaves_the_model_as_it_was(
    folders: dict[str, Path],
):
    model = build_pico("llama")
    before = everything(model)
    engine = build_engine(model=model, fuse=True)
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
        engine.add_request(greedy([5, 6, 7, 8], name, 30, id=name))
    while engine.steps < 12:
        engine.step()
    engine.close()
    assert_same(model, before)
    assert all(
        found[0].finish_reason == "abort" for found in map(engine.completion, folders) if found
    )
    assert_idle(engine)


def test_between_two_steps_the_model_computes_what_it_did_before(folders: dict[str, Path]):
    model = build_pico("llama")
    logits = logits_of(model)
    with build_engine(model=model) as engine:
        engine.add_adapter("a", folders["a"])
        engine.add_request(greedy([5, 6, 7, 8], "a", 30))
        for _ in range(20):
            engine.step()
            torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of luck")


FAILURES: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None] | None]] = {
    "weights of tenants": ({"tenant_weights": {"t": 0.0}}, None),
    "blocks": ({"block_size": 0}, None),
    "memory for keys": ({"kv_memory": 10}, None),
    "a size that is none": ({"slot_memory": "much"}, None),
    "slots": ({"max_slots": 0}, None),
    "limits": ({"max_batch": 0}, None),
    "the probe": ({}, lambda patch: patch.setattr(parts, "probe_model", fail)),
    "the store": ({}, lambda patch: patch.setattr(parts, "AdapterStore", fail)),
    "the digest": ({}, lambda patch: patch.setattr(parts, "digest_of_base", fail)),
    "a linear": ({}, lambda patch: patch.setattr(wiring, "EngineLinear", fail_later())),
    "attention": ({}, lambda patch: patch.setattr(parts, "Paging", fail)),
    "the runner": ({}, lambda patch: patch.setattr(parts, "Runner", fail)),
}


def fail_later() -> Callable[..., Any]:
    """The fifth linear cannot be made."""
    made: list[Any] = []

    def make(*args: Any) -> Any:
        made.append(wiring_linear(*args))
        return made[-1] if len(made) < 5 else fail()

    return make


wiring_linear = wiring.EngineLinear


@pytest.mark.parametrize("failure", FAILURES)
def test_a_constructor_that_fails_leaves_the_model_as_it_was(
    failure: str, monkeypatch: pytest.MonkeyPatch
):
    options, patch = FAILURES[failure]
    model = build_pico("llama")
    before = everything(model)
    if patch is not None:
        patch(monkeypatch)
    with pytest.raises((ValueError, RuntimeError)):
        build_engine(model=model, fuse=True, **options)
    assert_same(model, before)
    monkeypatch.undo()
    with build_engine(model=model) as engine:
        assert engine.generate([[5, 6, 7]])


def test_a_model_that_trained_is_given_back_in_training():
    model = build_pico("llama").train()
    model.model.layers[0].eval()
    before = everything(model)
    build_engine(model=model).close()
    assert_same(model, before)


def test_one_model_takes_one_engine():
    model = build_pico("llama")
    with build_engine(model=model) as engine:
        with pytest.raises(ValueError, match="engine"):
            build_engine(model=model)
        assert engine.generate([[5, 6, 7]])


def test_engines_over_twins_of_one_model_do_not_meet(folders: dict[str, Path]):
    """The same weights in memory, the same names for other adapters, steps in turn."""
    model = build_pico("llama")
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    assert twin.lm_head.weight is model.lm_head.weight
    draw = random.Random(0)
    requests = [greedy(random_prompt(draw), "x", 6, id=f"r{i}") for i in range(6)]
    with build_engine(model=model) as one, build_engine(model=twin) as other:
        one.add_adapter("x", folders["a"])
        other.add_adapter("x", folders["b"])
        seen = [record_samples(engine) for engine in (one, other)]
        done: list[dict[str, Any]] = [{}, {}]
        for request in requests:
            one.add_request(request)
            other.add_request(request)
        while one.has_work() or other.has_work():
            one.step()
            other.step()
        for i, engine in enumerate((one, other)):
            done[i] = {str(r.id): engine.completion(str(r.id)) for r in requests}
            assert_idle(engine)
    for i, folder in enumerate((folders["a"], folders["b"])):
        dense = merged({folder: 1.0})
        for request in requests:
            assert_like_plain(dense, request, done[i][str(request.id)], seen[i])


def test_ten_thousand_names_cost_nothing_until_one_is_asked_for(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Their folders do not exist: whoever looked would fail."""
    looked: list[object] = []
    with build_engine() as engine:
        monkeypatch.setattr(store, "read_content", lambda *args: looked.append(args))
        monkeypatch.setattr(Path, "stat", lambda *args, **_: looked.append(args))
        monkeypatch.setattr("builtins.open", lambda *args, **_: looked.append(args))
        start = time.process_time()
        for i in range(10_000):
            engine.add_adapter(f"adapter-{i}", tmp_path / f"nowhere-{i}")
        seconds = time.process_time() - start
        monkeypatch.undo()
        assert looked == []
        assert seconds < 1.0, f"{seconds:.2f} s of processor time for 10,000 names"
        stats = engine.store.stats()
        assert (stats.num_names, stats.num_contents, stats.num_loads) == (10_000, 0, 0)
        assert len(engine.adapters) == 10_000
        engine.add_adapter("adapter-77", folders["a"])
        done = run_all(
            engine, [greedy([5, 6], "adapter-77", 2, id="r"), greedy([5], "adapter-78", 2, id="s")]
        )
        assert done["r"][0].finish_reason == "length"
        assert done["s"][0].finish_reason == "error"
        assert engine.store.stats().num_contents == 1


def test_an_engine_is_freed_with_its_pools():
    """Nothing in the package or in transformers keeps a closed engine alive."""
    import gc
    import weakref

    engine: Engine | None = build_engine()
    assert engine is not None
    engine.generate([[5, 6, 7]])
    pool = weakref.ref(engine._parts.kv)
    model = weakref.ref(engine.model)
    engine.close()
    engine = None
    gc.collect()
    assert pool() is None
    assert model() is None
    assert attention.NAME  # the registered function stays, and holds nothing
