"""The prefix cache, end to end: found within one tenant, content, mixture and router, and never across."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loramux
from conformance.cases import Maker, every_variant
from engine.crowd import assert_close, build_engine, greedy, random_prompt, save_variants
from engine.helpers import assert_idle, record_samples, run_all, write_peft
from loramux.engine.blocks import BlockPool
from loramux.engine.engine import Engine
from loramux.engine.keys import PrefixKey, extend_hashes
from pico import build_pico

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Who = dict[str, Any]  # fields of a request: adapter, tenant, salt


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Contents that differ in as little as possible, and copies that differ in nothing."""
    root = tmp_path_factory.mktemp("contents")
    found = {name: write_peft(root / name, seed=seed) for seed, name in enumerate("ab")}
    found["a-copy"] = edited(found["a"], root / "a-copy")
    found["a-alpha"] = edited(found["a"], root / "a-alpha", lambda c, t: c.update(lora_alpha=7))
    found["a-one-number"] = edited(found["a"], root / "a-one-number", _nudge_one)
    variants = [v for v in every_variant() if v.method in ("mixlora", "mole")]
    saved = save_variants(Maker(root / "experts"), root, variants, "llama")
    for name in ("mixlora-top2", "mixlora-dora", "mole-layer", "mole-matrix"):
        found[name] = saved[name]
    found["other-router"] = rerouted(saved["mixlora-top2"], root / "router")
    found["other-gate"] = rerouted(saved["mole-layer"], root / "gate")
    return found


def edited(
    source: Path, folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None] | None = None
) -> Path:
    """A copy of an adapter's folder, with its config and tensors passed through `edit`."""
    shutil.copytree(source, folder)
    if edit is not None:
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        edit(config, tensors)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _nudge_one(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[max(tensors)][0, 0] += 1e-3


def rerouted(source: Path, folder: Path) -> Path:
    """The same rows under a router that differs in one number."""
    handle = loramux.load(build_pico("llama"), source)
    router = next(iter(handle.adapters["default"].routers_by_key.values()))
    with torch.no_grad():
        next(router.parameters()).view(-1)[0] += 1e-2
    return handle.save(folder)


WHO: list[Who] = [
    {"adapter": None},
    {"adapter": None, "tenant": "t1"},
    {"adapter": None, "tenant": "t1", "salt": "s"},
    {"adapter": "a"},
    {"adapter": "a", "tenant": "t1"},
    {"adapter": "a", "salt": "s"},
    {"adapter": "a", "salt": ""},
    {"adapter": "b"},
    {"adapter": "a-alpha"},
    {"adapter": "a-one-number"},
    {"adapter": {"a": 0.7, "b": 0.3}},
    {"adapter": {"b": 0.3, "a": 0.7}},
    {"adapter": {"a": 0.3, "b": 0.7}},
    {"adapter": {"a": 0.7, "a-copy": 0.3}},
    {"adapter": {"a": 0.7}},
    {"adapter": {"a": 1.0, "b": 1e-9}},
    {"adapter": "mixlora-top2"},
    {"adapter": "mixlora-dora"},
    {"adapter": "other-router"},
    {"adapter": "mole-layer"},
    {"adapter": "mole-matrix"},
    {"adapter": "other-gate"},
]
# Written differently, and the same contents for the same tenant all the same.
SAME: list[tuple[Who, Who]] = [
    ({"adapter": "a"}, {"adapter": "a-copy"}),
    ({"adapter": "a"}, {"adapter": {"a": 1.0}}),
    ({"adapter": {"a": 0.7, "b": 0.3}}, {"adapter": {"a-copy": 0.7, "b": 0.3}}),
    ({"adapter": None}, {"adapter": {}}),
    ({"adapter": "a", "tenant": "t1"}, {"adapter": "a", "tenant": "t2", "salt": "t1"}),
    ({"adapter": "b", "tenant": "x", "salt": "s"}, {"adapter": "b", "tenant": "y", "salt": "s"}),
]


@pytest.fixture
def engine(folders: dict[str, Path]):
    with build_engine(kv_memory="8MiB") as made:
        for name, folder in folders.items():
            made.add_adapter(name, folder)
        yield made


def ask(engine: Engine, who: list[Who], prompts: list[list[int]], label: str) -> list[int]:
    """How many tokens of each prompt were found in the cache."""
    ids = [f"{label}-{i}" for i in range(len(who))]
    asked = zip(who, prompts, ids, strict=True)
    done = run_all(engine, [greedy(p, tokens=1, id=name, **w) for w, p, name in asked])
    assert all(done[name][0].error is None for name in ids)
    return [done[name][0].cached_tokens for name in ids]


def test_no_pair_that_differs_in_anything_shares_a_prefix(engine: Engine):
    """All 231 pairs, both ways: each on a prompt that only these two have asked."""
    draw = random.Random(0)
    pairs = list(itertools.permutations(WHO, 2))
    prompts = [random_prompt(draw, 13, 13) for _ in pairs]
    firsts, seconds = ([pair[i] for pair in pairs] for i in range(2))
    assert ask(engine, firsts, prompts, "first") == [0] * len(pairs)
    found = ask(engine, seconds, prompts, "second")
    assert [pair for pair, cached in zip(pairs, found, strict=True) if cached] == []
    again = ask(engine, firsts, prompts, "again")
    assert again == [12] * len(pairs)
    assert_idle(engine)


@pytest.mark.parametrize(("first", "second"), SAME, ids=str)
def test_the_same_contents_for_the_same_tenant_share_a_prefix(
    engine: Engine, first: Who, second: Who
):
    prompt = random_prompt(random.Random(1), 14, 14)
    assert ask(engine, [first], [prompt], "first") == [0]
    assert ask(engine, [second], [prompt], "second") == [12]


@pytest.mark.parametrize("who", WHO, ids=str)
def test_an_answer_from_the_cache_is_that_without_it(folders: dict[str, Path], who: Who):
    draw = random.Random(2)
    common = random_prompt(draw, 30, 30)
    requests = [
        greedy([*common, *random_prompt(draw, 0, 9)], tokens=6, id=f"r{i}", **who) for i in range(5)
    ]
    runs = []
    for cached in (True, False):
        with build_engine(prefix_cache=cached) as engine:
            for name, folder in folders.items():
                engine.add_adapter(name, folder)
            seen = record_samples(engine)
            done = {}
            for request in requests:
                done.update(run_all(engine, [request]))
            runs.append((done, seen))
    (done, seen), (plain, wanted) = runs
    assert [done[f"r{i}"][0].cached_tokens >= 28 for i in range(5)] == [False, *[True] * 4]
    assert not any(plain[f"r{i}"][0].cached_tokens for i in range(5))
    for name in done:
        assert done[name][0].token_ids == plain[name][0].token_ids
    for key, row in wanted.items():
        assert_close(seen[key], row, key)


def test_a_name_that_gets_another_content_finds_nothing_of_the_one_before(
    engine: Engine, folders: dict[str, Path]
):
    """And finds it again once it stands for that content again."""
    prompt = random_prompt(random.Random(3), 20, 20)
    found = []
    for i, folder in enumerate(["a", "b", "a-one-number", "a", "a-copy", "b"]):
        engine.add_adapter("name", folders[folder])
        found += ask(engine, [{"adapter": "name"}], [prompt], f"r{i}")
    assert found == [0, 0, 0, 16, 16, 16]


def test_a_folder_overwritten_in_place_finds_nothing_of_the_content_before(
    engine: Engine, folders: dict[str, Path], tmp_path: Path
):
    prompt = random_prompt(random.Random(4), 20, 20)
    own = tmp_path / "own"
    shutil.copytree(folders["a"], own)
    engine.add_adapter("name", own)
    found = ask(engine, [{"adapter": "name"}], [prompt], "before")
    shutil.copytree(folders["b"], own, dirs_exist_ok=True)
    found += ask(engine, [{"adapter": "name"}], [prompt], "after")
    found += ask(engine, [{"adapter": "b"}], [prompt], "b itself")
    assert found == [0, 0, 16]


def test_what_an_answer_wrote_is_found_by_who_goes_on_from_it(engine: Engine):
    """A conversation: the second turn begins with the first turn's prompt and answer."""
    prompt = random_prompt(random.Random(5), 10, 10)
    done = run_all(engine, [greedy(prompt, "a", 9, id="turn 1")])
    text = [*prompt, *done["turn 1"][0].token_ids]
    done = run_all(engine, [greedy([*text, 7, 8, 9], "a", 2, id="turn 2")])
    assert done["turn 2"][0].cached_tokens == 16
    done = run_all(engine, [greedy([*text, 7, 8, 9], "b", 2, id="other")])
    assert done["other"][0].cached_tokens == 0


def test_other_weights_of_the_base_are_another_key(tmp_path: Path):
    """Two engines never share a pool; that their keys differ is what a shared one would rest on."""
    seeds = []
    for seed in (0, 1):
        with build_engine(model=build_pico("llama", seed=seed)) as engine:
            taken = []
            take = engine.scheduler.pool.register
            engine.scheduler.pool.register = lambda b, d, take=take, t=taken: (
                t.append(d),
                take(b, d),
            )  # type: ignore[method-assign]
            run_all(engine, [greedy(range(4, 20), None, 1, id="r")])
            seeds.append(taken[0])
    assert seeds[0] != seeds[1]


def test_ten_thousand_pairs_of_keys_never_find_each_others_blocks():
    """The keys that requests get, through the pool that finds blocks: any difference and nothing is found."""
    draw = random.Random(0)
    tokens = [draw.randrange(96) for _ in range(16)]
    pool = BlockPool(4, 4)
    keys = [_random_key(draw) for _ in range(20_400)]
    num_pairs = 0
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        (mine, other) = (_chain(key, tokens) for key in (first, second))
        blocks = pool.allocate(4)
        for block, digest in zip(blocks, mine, strict=True):
            pool.register(block, digest)
        pool.release(blocks)
        assert pool.find(mine) == blocks
        if first != second:
            num_pairs += 1
            assert pool.find(other) == [], (first, second)
        pool.clear_cache()
    assert num_pairs > 10_000


def _random_key(draw: random.Random) -> PrefixKey:
    """Few values per field, so that two keys often differ in one only."""
    parts = [(draw.choice(["d1", "d2"]), draw.choice([0.3, 0.7, 1.0])) for _ in range(2)]
    return PrefixKey(
        salt=draw.choice(["t", "t2", ""]),
        base=draw.choice(["base", "base2"]),
        parts=tuple(parts[: draw.randint(0, 2)]),
        router=draw.choice(["", "r"]),
        mask=draw.choice(["", "m"]),
    )


def _chain(key: PrefixKey, tokens: list[int]) -> list[str]:
    hashes: list[str] = []
    extend_hashes(hashes, key.digest, tokens, 4, 4)
    return hashes
