"""A packed, paged, chunked forward gives the logits of the plain one, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    PreTrainedModel,
    StableLmConfig,
)

from engine.pages import Pages, plain, texts
from loramux.engine.attention import Paging, paged_attention
from loramux.engine.kv import KVPool
from loramux.engine.sequence import Chunk, StepPlan
from loramux.ops import paged_kernel
from pico import _SIZES, FAMILIES, build_pico

LENGTHS = (41, 1, 23, 32, 57)
WINDOWED = {"mistral": {"sliding_window": 7}, "phi3": {"sliding_window": 16}}
OTHERS = {
    "gemma2": (
        Gemma2Config,
        {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    ),
    "cohere2": (Cohere2Config, {"sliding_window": 5}),
    "stablelm": (StableLmConfig, {}),
}  # fmt: skip


def build_other(family: str) -> PreTrainedModel:
    config_class, extra = OTHERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**_SIZES, **extra))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "torch":
        monkeypatch.setenv("LORAMUX_NO_CC", "1")
    paged_kernel.kernel.cache_clear()
    yield request.param
    paged_kernel.kernel.cache_clear()


@pytest.mark.parametrize(
    "counts", [(1,), (100,), (1, 1, 5, 9, 17)], ids=["tokens", "whole", "mixed"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_the_plain_forward(
    family: str, counts: tuple[int, ...], path: str
) -> None:
    model = build_pico(family, **WINDOWED.get(family, {}))
    pages = Pages(model)
    sequences = [pages.start(tokens) for tokens in texts(LENGTHS)]
    for sequence, got in zip(sequences, pages.run(sequences, counts), strict=True):
        # Both are up to 1.4e-5 off the forward in float64.
        torch.testing.assert_close(got, plain(model, sequence.tokens), rtol=0, atol=1.5e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_softcaps_windows_and_partial_rotation_are_honoured(family: str, path: str) -> None:
    model = build_other(family)
    model.set_attn_implementation("eager")  # of the others, only this one knows the softcap
    pages = Pages(model)
    sequences = [pages.start(tokens) for tokens in texts(LENGTHS)]
    for sequence, got in zip(sequences, pages.run(sequences, (1, 1, 5, 9, 17)), strict=True):
        expected = plain(model, sequence.tokens)
        atol = 1e-5 * max(1, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("block_size", [1, 5, 16, 48])
def test_blocks_may_have_any_size(block_size: int) -> None:
    model = build_pico("llama")
    pages = Pages(model, 200, block_size)
    sequences = [pages.start(tokens) for tokens in texts((41, 23))]
    for sequence, got in zip(sequences, pages.run(sequences, (1, 7, 12)), strict=True):
        torch.testing.assert_close(got, plain(model, sequence.tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_as_close_as_they_can_be(dtype: torch.dtype) -> None:
    model = build_pico("llama", dtype=dtype)
    pages = Pages(model)
    (sequence,) = [pages.start(tokens) for tokens in texts((41,))]
    (got,) = pages.run([sequence], (1, 9))
    expected = build_pico("llama", dtype=torch.float64)(torch.tensor([sequence.tokens])).logits[0]
    limit = 16 * max(torch.finfo(dtype).eps, 1e-7) * expected.abs().max()
    assert (got.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_sequence_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    """The attention alone: a framework's linears do differ with the number of rows."""
    pages = Pages(build_pico("gemma3", dtype=dtype))
    layer, heads = pages.shape.layers[0].module, pages.shape.layers[0].num_heads
    sequences = [pages.start(tokens) for tokens in texts((41, 23, 60))]
    together = [Chunk(s, 0, s.num_tokens) for s in sequences]
    again = [Chunk(s, s.num_tokens - 1, 1) for s in sequences[:2]]
    for chunks in (together, [*again, Chunk(sequences[2], 9, 30)]):
        num = sum(chunk.count for chunk in chunks)
        inputs = [torch.randn(1, h, num, 8).to(dtype) for h in (heads, 2, 2)]
        whole, first = attend_alone(pages, layer, chunks, inputs), 0
        for chunk in chunks:
            rows = slice(first, first + chunk.count)
            got = attend_alone(pages, layer, [chunk], [x[:, :, rows] for x in inputs])
            assert torch.equal(got, whole[rows])
            first += chunk.count


def attend_alone(
    pages: Pages, layer: nn.Module, chunks: list[Chunk], inputs: list[Tensor]
) -> Tensor:
    """[N, H, D]: one layer's attention in a step of these chunks."""
    pages.paging.begin(StepPlan(tuple(chunks)))
    out = paged_attention(layer, *inputs, None)[0]
    pages.paging.end()
    return out[0]


def test_a_sequence_that_turned_to_nan_leaves_the_others_bit_equal() -> None:
    model = build_pico("llama")
    found = []
    for poison in (1.0, torch.nan):
        pages = Pages(model)
        sequences = [pages.start(tokens) for tokens in texts((20, 30, 18))]
        pages.step([Chunk(s, 0, s.num_tokens - 1) for s in sequences])
        for tensor in pages.pool.keys_LBGDTP:
            tensor[sequences[1].blocks[0]] *= poison
        found.append(pages.step([Chunk(s, s.num_tokens - 1, 1) for s in sequences]))
    (a, _, c), (x, y, z) = found
    assert y.isnan().any()
    assert torch.equal(a, x) and torch.equal(c, z)


def test_copied_blocks_let_a_sequence_go_another_way() -> None:
    model = build_pico("llama")
    pages = Pages(model)
    (tokens,) = texts((40,))
    first, second = pages.start(tokens), pages.start(tokens)
    pages.step([Chunk(first, 0, 35)])
    own = second.blocks
    second.blocks = [*first.blocks[:2], own[2]]  # shared, but for the last one
    second.tokens[35:] = first.tokens[35:][::-1]
    copies = ((first.blocks[2], own[2]),)
    pages.step([Chunk(first, 35, 1), Chunk(second, 35, 1)], copies)
    got = pages.step([Chunk(first, 36, 4), Chunk(second, 36, 4)])
    for sequence, logits in zip((first, second), got, strict=True):
        expected = plain(model, sequence.tokens)[36:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_between_steps_the_model_is_its_own_again() -> None:
    model = build_pico("llama")
    (tokens,) = texts((20,))
    before = plain(model, tokens)
    name = model.config._attn_implementation
    pages = Pages(model)
    sequence = pages.start(tokens)
    pages.step([Chunk(sequence, 0, 20)])
    assert model.config._attn_implementation == name
    assert torch.equal(plain(model, tokens), before)
    pages.paging.begin(StepPlan((Chunk(sequence, 0, 20),)))
    assert model.config._attn_implementation != name
    pages.paging.close()
    assert model.config._attn_implementation == name


def test_closing_leaves_no_trace_in_the_model() -> None:
    model = build_pico("llama")
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    pages = Pages(model)
    pages.step([Chunk(pages.start(texts((5,))[0]), 0, 5)])
    assert {path: set(vars(module)) for path, module in model.named_modules()} != before
    pages.paging.close()
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


def test_more_tokens_than_blocks_are_refused() -> None:
    pages = Pages(build_pico("llama"))
    sequence = pages.start(texts((33,))[0])
    sequence.blocks.pop()
    with pytest.raises(ValueError, match="2 blocks of 16 tokens cannot hold 33"):
        pages.paging.begin(StepPlan((Chunk(sequence, 0, 33),)))
    assert pages.model.config._attn_implementation == "sdpa"


def test_a_pool_of_another_model_is_refused() -> None:
    pages = Pages(build_pico("llama"))
    with pytest.raises(ValueError, match="another model"):
        Paging(pages.model, pages.shape, KVPool(pages.shape.kv[:1], 4))
