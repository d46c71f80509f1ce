"""A row that is not finite ends its own request; no other row of the batch, and no later request, notices."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import loramux
from conformance.cases import Maker, Variant, every_variant, named, nudge, variants_of
from engine.crowd import build_engine, greedy, random_prompt, save_variants
from engine.helpers import (
    Done,
    Logits,
    assert_idle,
    assert_like_plain,
    record_samples,
    run_all,
    warm_up,
)
from loramux.core.method import MethodConfig
from loramux.engine.kv import KVPool
from loramux.engine.request import NOT_FINITE, Request
from pico import build_pico

HUGE = (
    1e30  # of both A and B: every number is finite in fp32, and what they make of any input is not
)
# A gain of DoRA depends on all rows, so no input would be without them.
TRIGGERED = [v for v in variants_of("lora", "mixlora", "mole") if not v.settings.get("use_dora")]
PROMPT = [7, 30, 51, 12, 66, 9, 24]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nan")


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, Path]:
    return save_variants(Maker(root / "experts"), root, every_variant(), "llama")


def save_bad(variant: Variant, root: Path, factor: float) -> Path:
    """The variant with all rows of its first layer times `factor`."""
    folder = root / f"{variant.name}-{factor}"
    if not folder.exists():
        torch.manual_seed(0)
        config = Maker(root / "experts").config(variant)
        handle = loramux.attach(build_pico("llama"), config)
        adapter = handle.adapters["default"]
        nudge(adapter, 99)
        with torch.no_grad():
            for path, rows in adapter.rows.items():
                if ".0." in path:
                    rows.a.mul_(factor)
                    rows.b.mul_(factor)
        handle.save(folder)
    return folder


def crowd_of(names: list[str], tokens: int = 8) -> list[Request]:
    draw = random.Random(8)
    return [
        greedy(random_prompt(draw, 4, 12), name, tokens, id=f"{name} {i}", tenant=f"t{i}")
        for i, name in enumerate([None, *names])
    ]


def run_with(bad: Path, folders: dict[str, Path], **options: object) -> tuple[Done, Logits]:
    """The crowd and, in the middle of it, one short request to the adapter that may be bad."""
    crowd = crowd_of(list(folders))
    middle = len(crowd) // 2
    requests = [*crowd[:middle], greedy(PROMPT, "bad", 1, id="bad"), *crowd[middle:]]
    with build_engine(**options) as engine:
        for name, folder in {**folders, "bad": bad}.items():
            engine.add_adapter(name, folder)
        warm_up(engine)  # so that both runs admit alike
        seen = record_samples(engine)
        done = run_all(engine, requests)
        assert_idle(engine)
    return done, seen


@pytest.mark.parametrize("most_rows", [16, 2048])
@pytest.mark.parametrize("variant", every_variant(), ids=named)
def test_a_row_that_is_not_finite_ends_its_request_and_leaves_the_others_bit_equal(
    variant: Variant, most_rows: int, folders: dict[str, Path], root: Path
):
    """In small steps and in large ones; its neighbours are a quarter of all kinds, another one for each variant."""
    options = {"max_step_tokens": most_rows, "max_batch": 12}
    first = list(folders).index(variant.name) % 4
    folders = {name: folders[name] for name in list(folders)[first::4]}
    done, seen = run_with(save_bad(variant, root, HUGE), folders, **options)
    (bad,) = done["bad"]
    assert bad.finish_reason == "error", bad
    assert bad.error is not None and "not finite" in bad.error
    assert getattr(bad.error, "code", "") == NOT_FINITE
    assert bad.token_ids == ()
    calm, wanted = run_with(save_bad(variant, root, 1.0), folders, **options)
    assert calm["bad"][0].finish_reason == "length"
    others = {key: row for key, row in seen.items() if key[0] != "bad"}
    assert others.keys() == {key for key in wanted if key[0] != "bad"}
    for key, row in others.items():
        if key[0].startswith(f"{variant.name} "):
            # It may share a product with the row that is not finite, whose router then chose otherwise: sums round.
            torch.testing.assert_close(row, wanted[key], rtol=0, atol=1e-5, msg=str(key))
        else:
            assert torch.equal(row, wanted[key]), key
    for name in done.keys() - {"bad"}:
        assert done[name][0].token_ids == calm[name][0].token_ids
        assert done[name][0].error is None


@pytest.mark.parametrize("max_chunk", [3, 512])
def test_blocks_of_a_row_that_was_not_finite_serve_later_requests(
    max_chunk: int, folders: dict[str, Path], root: Path
):
    """The pool is small: what comes next gets the very blocks that hold NaN."""
    bad = save_bad(next(v for v in every_variant() if v.name == "lora-plain"), root, HUGE)
    draw = random.Random(3)
    later = [greedy(random_prompt(draw, 5, 20), None, 7, id=f"r{i}") for i in range(8)]
    with build_engine(kv_memory=20_000, max_chunk=max_chunk) as engine:
        engine.add_adapter("bad", bad)
        for i in range(2):
            full = engine.blocks.num_blocks * engine.blocks.block_size
            prompt = random_prompt(draw, full - 2, full - 2)
            done = run_all(engine, [greedy(prompt, "bad", 2, id=f"bad{i}")])
            assert done[f"bad{i}"][0].finish_reason == "error"
        assert engine.blocks.num_cached == 0, "keys that are not finite can be found"
        assert holds_nan(engine._parts.kv), "no block holds NaN: nothing is shown"
        seen = record_samples(engine)
        done = run_all(engine, later)
        assert_idle(engine)
    base = build_pico("llama")
    for request in later:
        assert_like_plain(base, request, done[str(request.id)], seen)


@pytest.mark.parametrize("variant", TRIGGERED, ids=named)
def test_a_row_that_stops_being_finite_while_it_decodes_ends_then(
    variant: Variant, root: Path, folders: dict[str, Path], tmp_path: Path
):
    """It keeps the tokens drawn before; its neighbours go on."""
    base, num_good = base_with_a_trigger()
    crowd = [
        greedy(prompt, name, 12, id=f"r{i}")
        for i, (prompt, name) in enumerate(
            [([5, 6], None), ([9, 9, 11], "mixlora-top2"), ([70, 8], "mole-layer")]
        )
    ]
    near = {name: folders[name] for name in ("mixlora-top2", "mole-layer")}
    runs = []
    for size in (3.0, 3e38):  # the same batch, first with that row finite
        config = Maker(root / "experts").config(variant)
        trigger = write_trigger(config, tmp_path / str(size), size)
        with build_engine(
            model=copy.deepcopy(base), prefix_cache=False, check_base=False
        ) as engine:
            for name, folder in {**near, "trigger": trigger}.items():
                engine.add_adapter(name, folder)
            warm_up(engine)
            seen = record_samples(engine)
            done = run_all(engine, [*crowd, greedy(PROMPT, "trigger", num_good + 1, id="t")])
            assert_idle(engine)
        runs.append((done["t"][0], {key: row for key, row in seen.items() if key[0] != "t"}))
    (calm, wanted), (bad, rows) = runs
    assert calm.finish_reason == "length"
    assert bad.finish_reason == "error"
    assert bad.token_ids == calm.token_ids[:num_good]
    assert num_good >= 3
    assert rows.keys() == wanted.keys()
    assert [key for key, row in rows.items() if not torch.equal(row, wanted[key])] == []


def holds_nan(pool: KVPool) -> bool:
    tensors = [
        t for value in vars(pool).values() for t in (value if isinstance(value, list) else [value])
    ]
    return any(torch.isnan(t).any() for t in tensors if isinstance(t, torch.Tensor))


def base_with_a_trigger() -> tuple[nn.Module, int]:
    """A base, and after how many tokens its answer to PROMPT meets the one token whose first number is not 0."""
    base = build_pico("llama")
    embedding = base.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 0] = 0
        with build_engine(model=base) as engine:
            ((completion,),) = engine.generate([greedy(PROMPT, None, 20)])
        answer = completion.token_ids
        at = next(i for i in range(2, 20) if answer[i] not in {*PROMPT, *answer[:i]})
        embedding[answer[at], 0] = 1
    return base, at + 1


def write_trigger(config: MethodConfig, folder: Path, size: float) -> Path:
    """An adapter that adds nothing but where the first number of an embedding is not 0, and then `size` or so."""
    torch.manual_seed(0)
    handle = loramux.attach(build_pico("llama"), config)
    adapter = handle.adapters["default"]
    nudge(adapter)
    with torch.no_grad():
        for path, rows in adapter.rows.items():
            rows.b.zero_()
            if path == "model.layers.0.self_attn.v_proj":
                rows.a.zero_()
                rows.a[:, 0] = size
                rows.b.fill_(1)
    return handle.save(folder)
