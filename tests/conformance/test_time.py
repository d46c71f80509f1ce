"""Invariant 4: a prompt in one piece, in chunks (where allowed) or token by token gives the same logits.

Prompt-routed adapters must see the whole prompt at once: afterwards tokens may come one by one, in chunks they are
refused wherever the chunks can be told from an answer.
"""

import pytest
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import (
    Maker,
    Request,
    Variant,
    every_variant,
    padded,
    random_requests,
    routes_on_prompt,
)
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29, 44, 12, 33], [90, 33, 12, 7, 70, 52, 9, 20, 6]])
PROMPT = 4
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
CASES = [("llama", "reference"), ("llama", "auto"), ("gemma3", "auto"), ("gpt2", "auto")]


def in_pieces(model: nn.Module, sizes: list[int]) -> Tensor:
    """Logits of all positions, computed piece by piece with a KV cache."""
    cache, logits, start = None, [], 0
    with torch.no_grad():
        for size in sizes:
            piece = IDS[:, start : start + size]
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            logits.append(out.logits)
    assert start == IDS.shape[1]
    return torch.cat(logits, dim=1)


def in_one_piece(model: nn.Module, handle: loramux.Handle) -> Tensor:
    prompt = torch.zeros_like(IDS, dtype=torch.bool)
    prompt[:, :PROMPT] = True
    with torch.no_grad(), handle.batch(prompt_mask=prompt):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_an_answer_token_by_token_has_the_logits_of_the_whole_sequence(
    make: Maker, variant: Variant, family: str, backend: str
):
    model = build_pico(family)
    handle = make.attach(model, variant, family, backend=backend)
    whole = in_one_piece(model, handle)
    steps = in_pieces(model, [PROMPT] + [1] * (IDS.shape[1] - PROMPT))
    torch.testing.assert_close(steps, whole, **TOLERANCE)


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 3, 2]], ids=["tokens", "chunks"])
@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_a_prompt_in_chunks_has_the_logits_of_the_whole_where_routing_is_causal(
    make: Maker, variant: Variant, sizes: list[int]
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    if routes_on_prompt(handle):
        pytest.skip("the routing reads the whole prompt")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    torch.testing.assert_close(in_pieces(model, sizes), whole, **TOLERANCE)


def test_a_long_answer_may_come_in_pieces_under_the_routes_of_its_prompt(make: Maker):
    for variant in every_variant():
        model = build_pico("llama")
        handle = make.attach(model, variant)
        whole = in_one_piece(model, handle)
        torch.testing.assert_close(in_pieces(model, [PROMPT, 3, 2]), whole, **TOLERANCE)


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_a_chunked_prefill_in_generate_is_refused_where_the_prompt_routes(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    whole = model.generate(IDS, **options)
    if routes_on_prompt(handle):
        with pytest.raises(ValueError, match="cannot be chunked"):
            model.generate(IDS, prefill_chunk_size=4, **options)
    else:
        assert torch.equal(model.generate(IDS, prefill_chunk_size=4, **options), whole)
    # The refusal must not outlive the call.
    assert torch.equal(model.generate(IDS, **options), whole)


def prompt_variants() -> list[Variant]:
    return [v for v in every_variant() if v.name in ("milora-ste", "milora-dora", "mole-prompt")]


@pytest.mark.parametrize("variant", prompt_variants(), ids=lambda v: v.name)
def test_a_second_chunk_marked_as_prompt_is_refused(make: Maker, variant: Variant):
    model = build_pico("llama")
    make.attach(model, variant)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :4], use_cache=True)
        with pytest.raises(ValueError, match="prompt"):
            model(
                input_ids=IDS[:, 4:],
                past_key_values=first.past_key_values,
                prompt_mask=torch.ones_like(IDS[:, 4:]),
            )


@pytest.mark.parametrize("variant", prompt_variants(), ids=lambda v: v.name)
def test_a_cache_filled_without_the_adapter_is_refused(make: Maker, variant: Variant):
    model = build_pico("llama")
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        make.attach(model, variant)
        with pytest.raises(ValueError, match="cache"):
            model(input_ids=IDS[:, 4:5], past_key_values=cache)


@pytest.mark.parametrize("filled_by", [None, "other"])
@pytest.mark.parametrize("variant", prompt_variants(), ids=lambda v: v.name)
def test_a_cache_filled_under_another_adapter_is_refused(
    make: Maker, variant: Variant, filled_by: str | None
):
    model = build_pico("llama")
    handle = make.attach(model, variant)
    handle.add(make.config(variant), name="other")
    handle.use(filled_by)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        handle.use("default")
        with pytest.raises(ValueError, match="cache"):
            model(input_ids=IDS[:, 4:5], past_key_values=cache)


@pytest.mark.parametrize("variant", prompt_variants(), ids=lambda v: v.name)
def test_two_conversations_interleaved_keep_their_own_routes(make: Maker, variant: Variant):
    model = build_pico("llama")
    make.attach(model, variant)
    rows = [IDS[:1], IDS[1:]]
    expected, caches = [], []
    with torch.no_grad():
        for row in rows:
            out = model(input_ids=row[:, :PROMPT], use_cache=True)
            out = model(input_ids=row[:, PROMPT : PROMPT + 1], past_key_values=out.past_key_values)
            expected.append(out.logits)
        caches = [model(input_ids=row[:, :PROMPT], use_cache=True).past_key_values for row in rows]
        got = [
            model(input_ids=row[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
            for row, cache in zip(rows, caches, strict=True)
        ]
    assert not torch.allclose(expected[0], expected[1])
    torch.testing.assert_close(got, expected)


def test_a_mixed_batch_decodes_as_it_would_in_one_piece(make: Maker):
    handle = make.attach_all(build_pico("llama"), every_variant())
    model = handle.model
    requests = random_requests([None, *handle.adapters], 10, 3, longest=6)
    answers = torch.randint(4, 96, (len(requests), 3))
    inputs = padded(requests, "left")
    prompt_mask = inputs["attention_mask"]
    names = [r.adapter for r in requests]
    longer = padded(
        [Request(r.adapter, (*r.ids, *a.tolist())) for r, a in zip(requests, answers, strict=True)],
        "left",
    )
    marks = torch.cat([prompt_mask, torch.zeros_like(answers)], dim=1)
    with torch.no_grad(), handle.batch(adapters=names, prompt_mask=marks):
        whole = model(**longer).logits
    with torch.no_grad(), handle.batch(adapters=names):
        out = model(**inputs, use_cache=True)
        for step in range(answers.shape[1]):
            width = inputs["input_ids"].shape[1] + step
            out = model(
                input_ids=answers[:, step : step + 1],
                attention_mask=longer["attention_mask"][:, : width + 1],
                position_ids=longer["position_ids"][:, width : width + 1],
                past_key_values=out.past_key_values,
            )
            expected = whole[:, width]
            tolerance = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(out.logits[:, -1], expected, atol=tolerance, rtol=0)
