"""Gated activations are fused where an FFN multiplies them and does nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.pages import plain, texts
from loramux.engine.activations import fuse_activations
from loramux.ops import gated
from pico import FAMILIES, build_pico


@pytest.fixture(autouse=True)
def needs_a_kernel() -> None:
    if gated.kernel().call is None:
        pytest.skip(gated.kernel().why_not)


def fused_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_activations_of_every_family_are_fused_and_the_logits_stay(
    family: str, dtype: torch.dtype
) -> None:
    model = build_pico(family, dtype=dtype)
    (tokens,) = texts((30,))
    before = plain(model, tokens)
    undo = fuse_activations(model)
    assert len(fused_of(model)) == (0 if family == "gpt2" else 2)  # GPT-2 does not gate
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(plain(model, tokens), before, rtol=0, atol=limit)
    undo()
    assert not fused_of(model) and torch.equal(plain(model, tokens), before)


def test_gradients_flow_as_before() -> None:
    model, other = build_pico("llama"), build_pico("llama")
    fuse_activations(model)
    for each in (model, other):
        each(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and torch.equal(ours.grad, theirs.grad)


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)
        self.act = nn.SiLU() if act is None else act


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.act(self.gate(x))


class Added(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) + self.up(x)


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.act(self.up(x))


class Inside(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.act(self.gate(x))) * self.up(x)


def test_the_order_of_the_factors_does_not_matter() -> None:
    model = nn.Sequential(Gated())
    fuse_activations(model)
    assert fused_of(model) == [model[0].act]
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = Gated.forward(model[0], x)
        fused = model(x)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(fused, model[0].up(x) * nn.functional.silu(model[0].gate(x)))


@pytest.mark.parametrize(
    "model",
    [Added(), Twice(), Inside(), Gated(nn.ReLU()), Gated(nn.GELU()), Gated(nn.Softmax(-1))],
    ids=["added", "twice", "inside", "relu", "exact gelu", "softmax"],
)
def test_blocks_that_do_something_else_are_left_alone(model: nn.Module) -> None:
    fuse_activations(model)
    assert not fused_of(model)


def test_an_activation_that_blocks_share_is_left_alone() -> None:
    shared = nn.SiLU()
    model = nn.Sequential(Gated(shared), Added(shared))
    fuse_activations(model)
    assert not fused_of(model)


def test_an_input_that_the_kernel_does_not_take_runs_as_before() -> None:
    model = nn.Sequential(Gated())
    fuse_activations(model)
    with torch.no_grad():
        x = torch.randn(3, 8)
        expected = model[0].up(x) * nn.functional.silu(model[0].gate(x))
        model.double()
        got = model(x.double())
    torch.testing.assert_close(got.float(), expected)
