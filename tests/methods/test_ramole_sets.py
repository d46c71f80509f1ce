"""Sets of retrieved adapters under a trained router: in a handle, in an engine, in a pool, and what is refused."""

import dataclasses
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from engine.crowd import assert_close, build_engine, dense_logits, greedy, random_prompt, record
from loramux.core.router import RouteView
from loramux.core.types import Route
from loramux.engine.ramole import RamolePool, assemble_for_engine
from loramux.formats.errors import FormatError
from loramux.methods.ramole import RouterLoRA
from loramux.persist.ramole import assemble, pool_key, pool_name, read_router
from methods.frozen_case import IDS, Frozen, random_experts
from methods.ramole_case import routed
from pico import build_pico


class Trained:
    """A saved router, and four adapters under ids as a registry gives them."""

    def __init__(self, root: Path):
        made = routed(root / "trained", std=0.2, ranks=(4, 2, 3, 5), double=False)
        self.router = made.handle.save(root / "router")
        names = ("acme/red@1", "acme/green@2", "zoo/blue@1", "zoo/grey@7")
        self.folders = dict(zip(names, made.folders, strict=True))
        self.ids = list(names)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("ramole"))


def logits(trained: Trained, ids: list[str], tokens: torch.Tensor = IDS[:1]) -> torch.Tensor:
    model: Any = build_pico("llama")
    adapter = assemble(model, {i: trained.folders[i] for i in ids}, trained.router, name="set")
    handle = loramux.attach(model, loramux.LoraConfig(r=2), name="other")
    handle.put(adapter)
    handle.use("set")
    with torch.no_grad():
        return model(input_ids=tokens).logits  # type: ignore[no-any-return]


def test_the_order_in_which_adapters_are_named_changes_no_bit(trained: Trained):
    assert torch.equal(logits(trained, trained.ids[:3]), logits(trained, trained.ids[2::-1]))
    router = read_router(trained.router)
    assert pool_key(trained.ids, router) == pool_key(reversed(trained.ids), router)


def test_a_key_tells_sets_and_routers_apart(trained: Trained, tmp_path: Path):
    router = read_router(trained.router)
    other = routed(tmp_path / "a", std=0.1, ranks=(4, 2), double=False).handle
    changed = read_router(other.save(tmp_path / "other"))
    keys = {
        pool_key(ids, one) for ids in (trained.ids, trained.ids[:2]) for one in (router, changed)
    }
    assert len(keys) == 4
    assert pool_name(trained.ids, router).startswith("ramole-")


def test_an_assembled_set_saves_and_loads_as_any_mixture(trained: Trained, tmp_path: Path):
    model: Any = build_pico("llama")
    adapter = assemble(model, dict(list(trained.folders.items())[:3]), trained.router, name="set")
    assert adapter.experts == ("green-2", "red-1", "blue-1")
    handle = loramux.attach(model, loramux.LoraConfig(r=2), name="other")
    handle.put(adapter)
    folder = handle.save(tmp_path / "set", "set")
    loaded: Any = loramux.load(build_pico("llama"), folder).model
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS[:1]).logits, logits(trained, trained.ids[:3]))


def test_an_engine_answers_mixed_batches_of_sets_as_the_core_does(trained: Trained):
    draw = random.Random(3)
    sets = [trained.ids[:3], trained.ids[1:], trained.ids[:1], trained.ids]
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__)
        names = [pool.hold(engine, ids) for ids in sets]
        seen = record(engine)
        prompts = [random_prompt(draw, 5, 12) for _ in range(6)]
        requests = [greedy(prompt, names[i % 4], 3, id=str(i)) for i, prompt in enumerate(prompts)]
        done = engine.generate(requests)
        engine.check_integrity()
    core: Any = build_pico("llama")
    handle = loramux.attach(core, loramux.LoraConfig(r=2), name="other")
    known = {"sites": list(handle.sites.values()), "check_base": False}
    for name, ids in zip(names, sets, strict=True):
        parts = {i: trained.folders[i] for i in ids}
        handle.put(assemble(core, parts, trained.router, name=name, **known))
    for i, (completion,) in enumerate(done):
        assert completion.error is None, completion.error
        prompt = prompts[i]
        wanted = dense_logits(handle, names[i % 4], [*prompt, *completion.token_ids], len(prompt))
        for place in range(len(completion.token_ids)):
            assert_close(seen[str(i), len(prompt) + place], wanted[place], (i, place))


@pytest.mark.parametrize("fails", [False, True])
def test_requests_of_one_set_that_decode_are_asked_for_in_one_call(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, fails: bool
):
    """Also where the call for several fails: then each is asked for alone, and answered as ever."""
    original, sizes = RouterLoRA.forward, []

    def forward(router: RouterLoRA, view: RouteView, incoming: Route) -> Route:
        sizes.append(view.num_requests)
        if fails and view.num_requests > 1:
            raise RuntimeError("several at once")
        return original(router, view, incoming)

    draw = random.Random(5)
    requests = [greedy(random_prompt(draw, 5, 9), "set", 4, id=str(i)) for i in range(3)]
    with build_engine() as engine:
        parts = {id_: trained.folders[id_] for id_ in trained.ids[:3]}
        engine.add_adapter("set", assemble_for_engine(engine, parts, trained.router))
        alone = [engine.generate([request])[0][0].token_ids for request in requests]
        monkeypatch.setattr(RouterLoRA, "forward", forward)
        done = engine.generate(requests)
    assert [completion.token_ids for (completion,) in done] == alone
    assert set(sizes) == {1, 3}
    assert (sizes.count(1) == 3 * 14) is not fails


# -- the pool --------------------------------------------------------------------------------------


def test_a_set_is_assembled_once_and_has_one_name(trained: Trained):
    asked: list[str] = []

    def folder_of(id_: str) -> str:
        asked.append(id_)
        return trained.folders[id_]

    with build_engine() as engine:
        pool = RamolePool(trained.router, folder_of)
        first = pool.hold(engine, trained.ids[:2])
        assert pool.hold(engine, trained.ids[1::-1]) == first == pool.name_of(trained.ids[:2])
        assert asked == sorted(trained.ids[:2])
        assert engine.adapters == [first] and len(pool) == 1


def test_the_longest_unused_set_goes_first_and_one_that_is_held_stays(trained: Trained):
    sets = [trained.ids[i : i + 2] for i in range(3)]
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__, limit=2)
        held = pool.hold(engine, sets[0])
        second = pool.hold(engine, sets[1])
        pool.release(engine, second)
        third = pool.hold(engine, sets[2])
        assert set(engine.adapters) == {held, third} and sets[1] not in pool
        again = pool.hold(engine, sets[1])
        assert set(engine.adapters) == {held, third, again}, "all are held: none may go"
        for name in (third, again, held):
            pool.release(engine, name)
        assert len(pool) == 2 and set(engine.adapters) == {again, held}


def test_where_memory_is_full_idle_sets_make_room_and_held_ones_do_not(trained: Trained):
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__)
        first = pool.hold(engine, trained.ids[:3])
        engine.store.memory.limit = engine.store.stats().memory_bytes + 10_000
        with pytest.raises(ValueError, match="Raise memory_bytes"):
            pool.hold(engine, trained.ids[1:])
        assert engine.adapters == [first] and len(pool) == 1
        pool.release(engine, first)
        second = pool.hold(engine, trained.ids[1:])
        assert engine.adapters == [second] and len(pool) == 1
        engine.check_integrity()


def test_an_idle_set_makes_room_for_an_ordinary_adapter_and_one_that_is_held_is_waited_for(
    trained: Trained,
):
    """Regression: sets that nobody used kept the memory, and a request for another adapter waited for ever."""
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__)
        first, second = pool.hold(engine, trained.ids[:2]), pool.hold(engine, trained.ids[1:3])
        engine.store.memory.limit = engine.store.stats().memory_bytes
        engine.add_adapter("plain", trained.folders[trained.ids[0]])
        engine.add_request(greedy([3, 4, 5], "plain", 2, id="waits"))
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            engine.step()
        assert engine.completion("waits") is None
        pool.release(engine, first)
        pool.release(engine, second)
        while (done := engine.completion("waits")) is None:
            engine.step()
        assert done[0].error is None
        assert set(engine.adapters) == {"plain", second}
        engine.check_integrity()


def test_who_waits_for_a_set_to_be_let_go_keeps_nobody_from_using_it(trained: Trained):
    """Regression: newcomers were held back for it, those for whom the set was held among them, for ever."""
    with build_engine() as engine:
        limits = dataclasses.replace(engine.scheduler.limits, patience=0)
        engine.scheduler.limits = limits
        pool = RamolePool(trained.router, trained.folders.__getitem__)
        name = pool.hold(engine, trained.ids[:2])
        engine.store.memory.limit = engine.store.stats().memory_bytes
        engine.add_adapter("plain", trained.folders[trained.ids[0]])
        engine.add_request(greedy([3, 4, 5], "plain", 2, id="waits"))
        while not engine.store.wait(1.0):
            pass
        engine.step()
        engine.add_request(greedy([3, 4, 5], name, 2, id="uses"))
        for _ in range(20):
            engine.step()
        assert engine.completion("uses") is not None
        pool.release(engine, name)
        while (done := engine.completion("waits")) is None:
            engine.step()
        assert done[0].error is None


def test_no_set_goes_where_that_would_not_be_room_enough(trained: Trained):
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__)
        engine.add_adapter("given", pool.prepare(engine, trained.ids))
        idle, held = pool.hold(engine, trained.ids[:1]), pool.hold(engine, trained.ids[1:2])
        pool.release(engine, idle)
        engine.store.memory.limit = engine.store.stats().memory_bytes
        assert engine.store.tiers.make_room(2**40) == "never"
        assert set(engine.adapters) == {"given", idle, held}
        assert engine.store.tiers.make_room(1) == "made"
        assert engine.store.tiers.make_room(1) == "later"
        assert set(engine.adapters) == {"given", held}


def test_a_set_whose_name_somebody_took_back_is_in_nobodys_way(trained: Trained):
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__, limit=1)
        name = pool.hold(engine, trained.ids[:2])
        engine.remove_adapter(name)
        pool.release(engine, name)
        other = pool.hold(engine, trained.ids[1:3])
        assert engine.adapters == [other] and len(pool) == 1


def test_a_set_can_be_prepared_beside_a_running_engine(trained: Trained):
    with build_engine() as engine:
        pool = RamolePool(trained.router, trained.folders.__getitem__)
        adapter = pool.prepare(engine, trained.ids[:2])
        assert not engine.adapters
        assert pool.hold(engine, trained.ids[:2], adapter) == adapter.name


def test_a_set_that_is_refused_leaves_the_pool_and_the_engine_as_they_were(trained: Trained):
    with build_engine() as engine:
        pool = RamolePool(trained.router, {**trained.folders, "x": "nowhere"}.__getitem__)
        with pytest.raises(FormatError, match="nowhere is not a folder"):
            pool.hold(engine, ["x", trained.ids[0]])
        assert len(pool) == 0 and not engine.adapters


# -- refusals --------------------------------------------------------------------------------------


def code_of(build: Any) -> str:
    with pytest.raises(FormatError) as caught:
        build()
    return caught.value.code


def test_a_folder_that_is_no_ramole_is_no_router(trained: Trained, tmp_path: Path):
    gated = loramux.attach(
        build_pico("llama"), loramux.ArrowConfig(adapters=tuple(trained.folders.values()))
    )
    arrow = gated.save(tmp_path / "arrow")
    for folder in (tmp_path / "none", trained.folders["acme/red@1"], arrow):
        assert code_of(lambda folder=folder: read_router(folder)) == "not_a_router"


def test_another_base_is_refused(trained: Trained):
    other: Any = build_pico("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(FormatError, match="trained on"):
        assemble(other, trained.folders, trained.router)
    assemble(other, trained.folders, trained.router, check_base=False)
    with build_engine() as engine:
        with torch.no_grad():
            engine.store.layout.weight_OI(engine.store.layout.sites[0]).mul_(1.01)
        with pytest.raises(FormatError, match="trained on"):
            assemble_for_engine(engine, trained.folders, trained.router)


def test_an_adapter_at_linears_the_router_was_not_trained_at_is_refused(
    trained: Trained, tmp_path: Path
):
    every = random_experts(build_pico("llama"), (4, 2))
    attention = {site: e for site, e in every.items() if "attn" in site}
    narrow = Frozen(tmp_path / "narrow", loramux.RAMoLEConfig, experts=attention, double=False)
    router = narrow.handle.save(tmp_path / "router")
    model = build_pico("llama")
    assemble(model, {"a": narrow.folders[0]}, router)
    with pytest.raises(FormatError, match="where the router in .* was not trained") as caught:
        assemble(model, {"a": narrow.folders[0], "b": trained.folders["acme/red@1"]}, router)
    assert caught.value.code == "other_targets"


def test_mixtures_broken_files_and_empty_sets_are_refused(trained: Trained, tmp_path: Path):
    model = build_pico("llama")
    assert code_of(lambda: assemble(model, {}, trained.router)) == "none"
    assert code_of(lambda: assemble(model, {"a": trained.router}, trained.router)) == "not_plain"
    broken = tmp_path / "broken"
    shutil.copytree(trained.router, broken)
    whole = (broken / "router.safetensors").read_bytes()
    (broken / "router.safetensors").write_bytes(whole[:-4] + bytes([1, 2, 3, 4]))
    assert code_of(lambda: read_router(broken)) == "digest"
