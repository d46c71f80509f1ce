"""`generate` with adapters: cached or not, greedy or beam, in this process or the next, with one routing per prompt."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import (
    Maker,
    Variant,
    crossed,
    every_variant,
    first_variants,
    named,
    routes_on_prompt,
    variants_of,
)
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29, 44, 12], [90, 33, 12, 7, 70, 52, 9, 20]])
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
LAYERS = 2
NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
BEAM = {**GREEDY, "num_beams": 3}
WAYS = [
    pytest.param({**GREEDY, "use_cache": True}, id="greedy-cached"),
    pytest.param({**GREEDY, "use_cache": False}, id="greedy-uncached"),
    pytest.param({**BEAM, "use_cache": True}, id="beam-cached"),
    pytest.param({**BEAM, "use_cache": False}, id="beam-uncached"),
    pytest.param({**BEAM, "num_return_sequences": 2}, id="beams-returned"),
]


def generated(model: nn.Module, ids: Tensor = IDS, mask: Tensor = LEFT, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize(("variant", "family"), crossed("gemma3", "gpt2"), ids=named)
def test_greedy_tokens_with_a_cache_are_those_without(make: Maker, variant: Variant, family: str):
    model = build_pico(family)
    make.attach(model, variant, family, backend="auto")
    cached = generated(model, use_cache=True, **GREEDY)
    assert torch.equal(cached, generated(model, use_cache=False, **GREEDY))
    assert cached.shape[1] == IDS.shape[1] + NEW


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_beam_search_and_several_answers_work(make: Maker, variant: Variant):
    model = build_pico("llama")
    make.attach(model, variant, backend="auto")
    beams = generated(model, use_cache=True, **BEAM)
    assert torch.equal(beams, generated(model, use_cache=False, **BEAM))
    several = generated(model, num_return_sequences=3, **BEAM)
    assert torch.equal(several[0::3], beams)
    # One beam kept of one: the greedy answer.
    sampled = generated(model, num_return_sequences=2, top_k=1, **{**GREEDY, "do_sample": True})
    greedy = generated(model, **GREEDY)
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_a_prompt_generates_alone_what_it_generates_in_a_padded_batch(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    make.attach(model, variant, backend="auto")
    both = generated(model, **GREEDY)
    for row in range(2):
        real = LEFT[row].bool()
        single = generated(model, IDS[row : row + 1, real], LEFT[row : row + 1, real], **GREEDY)
        assert torch.equal(single[0, -NEW:], both[row, -NEW:])


@pytest.mark.parametrize("options", WAYS)
def test_requests_of_several_adapters_generate_as_they_would_alone(
    make: Maker, options: dict[str, Any]
):
    kinds = [*first_variants(), *(v for v in every_variant() if v.name == "mole-prompt")]
    handle = make.attach_all(build_pico("llama"), kinds)
    names: list[str | None] = [None, *handle.adapters]
    ids = torch.randint(4, 96, (len(names), 6))
    mask = torch.ones_like(ids)
    with handle.batch(adapters=names):
        together = generated(handle.model, ids, mask, **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        with handle.batch(adapters=[name]):
            single = generated(handle.model, ids[row : row + 1], mask[row : row + 1], **options)
        assert torch.equal(single, together[each * row : each * (row + 1)]), name


def count_router_calls(handle: loramux.Handle) -> Counter[str]:
    counts: Counter[str] = Counter()
    for adapter in handle.adapters.values():
        for path, router in adapter.routers.items():

            def count(*_: object, path: str = path) -> None:
                counts[path] += 1

            router.register_forward_hook(count)
    return counts


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("variant", variants_of("milora"), ids=lambda v: v.name)
def test_a_prompt_router_runs_exactly_once_per_layer_and_generation(
    make: Maker, variant: Variant, options: dict[str, Any]
):
    model = build_pico("llama")
    handle = make.attach(model, variant, backend="auto")
    counts = count_router_calls(handle)
    generated(model, **options)
    assert counts == {f"model.layers.{layer}": 1 for layer in range(LAYERS)}
    generated(model, **options)  # another prompt is another routing
    assert counts == {f"model.layers.{layer}": 2 for layer in range(LAYERS)}


@pytest.mark.parametrize("options", WAYS)
def test_a_prompt_gate_over_adapters_runs_once_per_unit_too(make: Maker, options: dict[str, Any]):
    (variant,) = [v for v in every_variant() if v.name == "mole-prompt"]
    model = build_pico("llama")
    handle = make.attach(model, variant)
    counts = count_router_calls(handle)
    generated(model, **options)
    assert set(counts.values()) == {1}
    assert len(counts) == LAYERS  # granularity "block"


@pytest.mark.parametrize("variant", first_variants(), ids=lambda v: v.name)
def test_a_static_cache_generates_the_same_tokens(make: Maker, variant: Variant):
    model = build_pico("llama")
    make.attach(model, variant, backend="auto")
    expected = generated(model, **GREEDY)
    got = generated(model, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_takes_the_prompt_mask_of_the_batch(make: Maker, num_beams: int, use_cache: bool):
    """Masking the first half of a prompt out of the routing is what the caller asked for, at every step."""
    model = build_pico("llama")
    handle = make.attach(model, variants_of("milora")[0])
    mask = torch.ones_like(IDS)
    half = mask.clone()
    half[:, :4] = 0
    options = {**GREEDY, "num_beams": num_beams, "use_cache": use_cache}
    with handle.batch(prompt_mask=half):
        model(IDS)
        expected = [record.gates for record in handle.routing()]
        seen: list[Tensor] = []
        for router in handle.adapters["default"].routers.values():
            router.register_forward_hook(lambda m, i, route: seen.append(route.gate))
        generated(model, mask=mask, **options)
    assert len(seen) == LAYERS
    for got, gates in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, gates.repeat_interleave(num_beams, dim=0))


def test_continuing_a_conversation_keeps_the_routes_of_its_first_turn(make: Maker):
    model = build_pico("llama")
    handle = make.attach(model, variants_of("milora")[0])
    counts = count_router_calls(handle)
    mask = torch.ones_like(IDS)
    out = model.generate(IDS, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    turn = torch.cat([out.sequences, torch.full((2, 3), 9)], dim=1)
    longer = torch.ones_like(turn)
    model.generate(turn, attention_mask=longer, past_key_values=out.past_key_values, **GREEDY)
    assert set(counts.values()) == {1}
    assert routes_on_prompt(handle)


NEW_PROCESS = """
import json, sys, torch
torch.set_num_threads(1)
import loramux
from pico import build_pico
found = {}
for folder in sys.argv[1:]:
    model = build_pico("llama")
    handle = loramux.load(model, folder)
    ids = torch.tensor(IDS)
    tokens = model.generate(
        ids, attention_mask=torch.tensor(MASK), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )
    found[folder] = {
        "tokens": tokens.sequences.tolist(),
        "first": tokens.logits[0].tolist(),
        "names": [name for name, _ in handle.adapters["default"].named_parameters()],
    }
print(json.dumps(found))
"""


def test_every_variant_generates_the_same_in_a_new_process(make: Maker, tmp_path: Path):
    """Saved here, loaded there under another hash seed: the same tokens, the same order of parameters."""
    expected, folders = {}, []
    for variant in every_variant():
        model = build_pico("llama")
        handle = make.attach(model, variant, backend="auto")
        folder = str(handle.save(tmp_path / variant.name))
        out = generated(model, return_dict_in_generate=True, output_logits=True, **GREEDY)
        adapter = handle.adapters["default"]
        names = [name for name, _ in adapter.named_parameters()]
        if adapter.method.servability == "static":  # gates over ranks are saved folded
            names = [name for name in names if ".gate." not in name]
        expected[folder] = (out.sequences.tolist(), out.logits[0], names)
        folders.append(folder)
    code = NEW_PROCESS.replace("IDS", str(IDS.tolist())).replace("MASK", str(LEFT.tolist()))
    code = code.replace("NEW", str(NEW))
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, *folders],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": tests,
            "PYTHONHASHSEED": "12345",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, (tokens, first, names) in expected.items():
        assert found[folder]["tokens"] == tokens, folder
        torch.testing.assert_close(torch.tensor(found[folder]["first"]), first)
        assert found[folder]["names"] == names, folder
