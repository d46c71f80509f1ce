"""X-LoRA against the dense oracle; its second KV cache under everything that generation does to the first."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from loramux.methods.xlora import XLoraConfig
from methods.bridge import LORA_FAMILIES, close, same_gradients
from methods.frozen_case import IDS, MASK, REAL, piecewise
from methods.planted import planted, shares_after_training
from methods.xlora_case import OPTIONS, assert_is_oracle, classified, params_of
from oracles import xlora
from pico import build_pico

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
PROMPTS = torch.tensor([[5, 17, 40, 61, 8], [90, 33, 12, 7, 70]])


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_logits_and_scalings_are_the_oracles(tmp_path: Path, kind: str):
    options, config = OPTIONS[kind]
    assert_is_oracle(classified(tmp_path, **options), config)


@pytest.mark.parametrize("family", LORA_FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "layerwise"])
def test_logits_and_scalings_are_the_oracles_in_every_family(
    tmp_path: Path, kind: str, family: str
):
    options, config = OPTIONS[kind]
    assert_is_oracle(classified(tmp_path, family=family, double=False, **options), config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(OPTIONS))
def test_gradients_are_the_oracles(tmp_path: Path, kind: str, checkpointing: bool):
    options, config = OPTIONS[kind]
    made = classified(tmp_path, **options)
    if checkpointing:
        made.model.gradient_checkpointing_enable({"use_reentrant": False})
        made.model.train()
    got = made.run()[REAL].square().mean()
    base = made.base().requires_grad_(False)
    expected, _ = xlora.oracle_logits(base, IDS, MASK, params_of(made), config)
    same_gradients(made.handle, got, expected[REAL].square().mean())


def test_given_scalings_mean_what_the_oracle_says(tmp_path: Path):
    made = classified(tmp_path, std=0.0)
    given = torch.zeros(2, 6, 1, 3, dtype=torch.float64)
    given[..., 1] = 1
    expected, _ = xlora.oracle_logits(
        made.base(), IDS, MASK, params_of(made), xlora.Config(), given
    )
    close(expected[REAL], made.alone(1)[REAL])


def test_dropout_of_the_classifier_acts_in_training_only(tmp_path: Path):
    made = classified(tmp_path, double=False, xlora_depth=2, xlora_size=32, xlora_dropout_p=0.5)
    assert torch.equal(made.run(), made.run())
    made.model.train()
    assert not torch.equal(made.run(), made.run())


def test_a_masked_adapter_has_no_weight(tmp_path: Path):
    made = classified(tmp_path)
    made.handle.mask_experts({"red": False, "blue": False})
    close(made.run().detach()[REAL], made.alone(1)[REAL])


# -- the second cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "layerwise"])
@pytest.mark.parametrize("sizes", [[6], [3, 3], [1] * 6, [4, 1, 1]])
def test_in_pieces_the_logits_are_those_of_the_whole(tmp_path: Path, kind: str, sizes: list[int]):
    made = classified(tmp_path, **OPTIONS[kind][0])
    whole = made.run(IDS[:1], None).detach()
    close(piecewise(made.model, IDS[:1], sizes), whole)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_of_generating_has_the_tokens_of_no_cache(tmp_path: Path, way: str, family: str):
    made = classified(tmp_path, double=False, family=family)
    options = {**GREEDY, **WAYS[way]}
    prompts = PROMPTS[:1] if way == "lookup" else PROMPTS
    got = made.model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    for key in ("cache_implementation", "disable_compile", "prefill_chunk_size"):
        options.pop(key, None)
    options.pop("prompt_lookup_num_tokens", None)
    expected = made.model.generate(
        prompts, attention_mask=torch.ones_like(prompts), use_cache=False, **options
    )
    assert torch.equal(got, expected)


def step(model: Any, cache: Any, token: int = 9) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits


def test_a_copy_of_a_cache_goes_its_own_way(tmp_path: Path):
    made = classified(tmp_path, double=False)
    with torch.no_grad():
        cache = made.model(PROMPTS[:1], use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    first = step(made.model, cache)
    step(made.model, cache, 20)
    assert torch.equal(step(made.model, other), first)
    cache.crop(-2)
    assert torch.equal(step(made.model, cache), first)


def test_a_reset_cache_starts_anew(tmp_path: Path):
    made = classified(tmp_path, double=False)
    with torch.no_grad():
        cache = made.model(PROMPTS[:1], use_cache=True).past_key_values
        expected = step(made.model, cache)
        cache.reset()
        made.model(PROMPTS[:1], past_key_values=cache, use_cache=True)
        assert torch.equal(step(made.model, cache), expected)


def test_a_batch_that_is_repeated_or_selected_takes_its_second_cache_along(tmp_path: Path):
    made = classified(tmp_path, double=False)
    with torch.no_grad():
        cache = made.model(PROMPTS, use_cache=True).past_key_values
        tokens = torch.tensor([[9], [20]])
        expected = made.model(tokens, past_key_values=copy.deepcopy(cache)).logits
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        got = made.model(tokens.repeat_interleave(2, 0), past_key_values=twice).logits
        close(got, expected.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([1]))
        close(made.model(tokens[1:], past_key_values=cache).logits, expected[1:])


@pytest.mark.parametrize("filled_by", ["nobody", "the base"])
def test_a_cache_filled_without_the_adapter_is_refused(tmp_path: Path, filled_by: str):
    made = classified(tmp_path, double=False)
    with torch.no_grad():
        if filled_by == "nobody":
            cache = made.base()(PROMPTS[:1], use_cache=True).past_key_values
        else:
            cache = made.model(PROMPTS[:1], use_cache=True).past_key_values
            made.handle.use(None)
            step(made.model, cache)
            made.handle.use("default")
    with pytest.raises(ValueError, match="filled without this adapter"):
        step(made.model, cache)
    assert made.run().isfinite().all()


def test_a_training_step_keeps_no_cache_of_the_base(tmp_path: Path):
    made = classified(tmp_path, double=False)
    made.model.train()
    made.model(IDS, attention_mask=MASK, labels=IDS, use_cache=True)
    state: Any = made.handle.dispatch.last
    assert state.twin is None


# -- refusals and the planted task ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_softmax_topk": True, "top_k_lora": 1}, "softmax of a softmax"),
        ({"enable_softmax": False, "enable_softmax_topk": True}, "needs top_k_lora"),
        ({"top_k_lora": 3}, r"1\.\.2"),
        ({"xlora_depth": 0}, "xlora_depth must be at least 1"),
        ({"softmax_temperature": 0}, "softmax_temperature"),
        ({"xlora_dropout_p": 1.5}, "xlora_dropout_p"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        XLoraConfig(adapters=("x/red", "x/green"), **options)


def test_the_adapter_that_knows_the_task_is_found(tmp_path: Path):
    folders, batch = planted(tmp_path)
    shares = shares_after_training(XLoraConfig(adapters=folders), batch)
    assert shares["knows"] > 1.5 * max(shares["noise"], shares["other"])


def test_adapters_are_needed():
    with pytest.raises(ValueError, match="needs trained adapters"):
        loramux.attach(build_pico("llama"), XLoraConfig())
