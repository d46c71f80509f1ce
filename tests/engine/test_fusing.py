"""A fused model computes what it did, can be taken back, and touches no other model."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from engine.pages import Pages, plain, texts
from loramux.engine.fusing import fuse_model, fuse_rotary, shortcut_children
from loramux.ops import rotary
from pico import FAMILIES, build_pico


@pytest.fixture(autouse=True)
def needs_a_kernel() -> None:
    if rotary.kernel().call is None:
        pytest.skip(rotary.kernel().why_not)


def changed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {path: set(vars(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_embeddings_of_every_family_are_fused_to_the_same_bits(
    family: str, dtype: torch.dtype
) -> None:
    model = build_pico(family, dtype=dtype)
    (tokens,) = texts((30,))
    before = plain(model, tokens)
    fuse_rotary(model)
    assert len(changed(model)) == (0 if family == "gpt2" else 2)  # GPT-2 has no rotary embedding
    assert torch.equal(plain(model, tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_in_pieces_gives_the_logits_of_the_plain_one(family: str) -> None:
    model = build_pico(family)
    (tokens,) = texts((50,))
    expected = plain(model, tokens)
    pages = Pages(model)
    fuse_model(model)
    shortcut_children(model)
    (got,) = pages.run([pages.start(tokens)], (1, 5, 17))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_undoing_gives_the_same_bits_and_leaves_no_trace() -> None:
    model = build_pico("qwen3")
    before, (tokens,) = attributes(model), texts((30,))
    expected = plain(model, tokens)
    undo_fusing, undo_shortcuts = fuse_model(model), shortcut_children(model)
    assert attributes(model) != before
    undo_shortcuts()
    undo_fusing()
    assert attributes(model) == before
    assert torch.equal(plain(model, tokens), expected)


def test_other_models_and_the_family_itself_are_not_touched() -> None:
    own = modeling_llama.apply_rotary_pos_emb
    other = build_pico("llama")
    fuse_model(build_pico("llama"))
    assert not changed(other) and modeling_llama.apply_rotary_pos_emb is own


def test_gradients_flow_as_before() -> None:
    model, other = build_pico("llama"), build_pico("llama")
    fuse_model(model)
    for each in (model, other):
        each(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "turn",
    [
        lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None]),
        lambda q, k, cos, sin: rotary.rotary_torch(q, k, cos, -sin),
        lambda q, k, sin, cos: rotary.rotary_torch(q, k, cos, sin),
        lambda q, k, cos, sin: rotary.rotary_torch(k, q, cos, sin),
        lambda q, k, cos: (q, k),
    ],
    ids=["no turn", "the other way", "swapped tables", "swapped heads", "another signature"],
)
def test_another_rotation_under_that_name_is_left_alone(turn: Any) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return apply_rotary_pos_emb(q, k, cos, sin)  # type: ignore[name-defined]  # noqa: F821

    plain_forward = Attention.forward
    Attention.forward = types.FunctionType(  # type: ignore[method-assign]
        plain_forward.__code__, {**plain_forward.__globals__, "apply_rotary_pos_emb": turn}
    )
    model = nn.Sequential(nn.Linear(2, 2), Attention())
    fuse_rotary(model)
    assert not changed(model)


def test_a_child_set_anew_is_the_one_that_is_found() -> None:
    model = build_pico("llama")
    undo = shortcut_children(model)
    mlp = model.model.layers[0].mlp
    kept, mlp.up_proj = mlp.up_proj, nn.Linear(32, 48, bias=False)
    assert mlp.up_proj is not kept and mlp.up_proj is mlp._modules["up_proj"]
    undo()
    assert mlp.up_proj is mlp._modules["up_proj"]


def test_a_shortcut_model_moves_and_saves_as_before() -> None:
    model = build_pico("llama")
    names = list(model.state_dict())
    shortcut_children(model)
    assert list(model.state_dict()) == names
    assert model.double().model.layers[0].mlp.up_proj.weight.dtype is torch.float64
