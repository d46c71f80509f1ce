"""Norms are fused where that gives the same numbers, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.pages import plain, texts
from loramux.engine.norms import fuse_norms, is_fused
from loramux.ops import norm
from loramux.ops.norm import RULES, Rule, rms_norm_torch
from pico import FAMILIES, build_pico


@pytest.fixture(autouse=True)
def needs_a_kernel() -> None:
    if norm.kernel().call is None:
        pytest.skip(norm.kernel().why_not)


def fused_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_fused(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rms_norm_of_every_family_is_fused_and_the_logits_stay(
    family: str, dtype: torch.dtype
) -> None:
    model = build_pico(family, dtype=dtype)
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    (tokens,) = texts((30,))
    before = plain(model, tokens)
    fuse_norms(model)
    assert fused_of(model) == norms
    got = plain(model, tokens)
    if dtype is torch.bfloat16:
        assert (got == before).float().mean() > 0.95
    torch.testing.assert_close(got, before, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.1)


def test_undoing_gives_the_same_bits_and_leaves_no_trace() -> None:
    model = build_pico("qwen3")
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    (tokens,) = texts((30,))
    expected = plain(model, tokens)
    undo = fuse_norms(model)
    undo()
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(plain(model, tokens), expected)


def test_names_parameters_and_hooks_stay() -> None:
    model = build_pico("llama")
    names = list(model.state_dict())
    heard: list[int] = []
    model.model.norm.register_forward_hook(lambda *_: heard.append(1))
    fuse_norms(model)
    plain(model, [5, 6, 7])
    assert list(model.state_dict()) == names and heard == [1]


def test_gradients_flow_as_before() -> None:
    model = build_pico("llama")
    fuse_norms(model)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_a_new_weight_is_used_at_once() -> None:
    model = build_pico("llama")
    fuse_norms(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        doubled = plain(model, [5, 6])
        model.model.norm.weight.data = model.model.norm.weight.data / 2
    torch.testing.assert_close(plain(model, [5, 6]), doubled / 2)


class Odd(nn.Module):
    """Looks like an RMS norm."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-6


class CentredNorm(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (32,), self.weight)


class OtherEps(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (32,), self.weight, 1e-3)


class TwoInputs(Odd):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (32,), self.weight, 1e-6) * gate


class GroupNorm(Odd):
    def forward(self, x: Tensor) -> Tensor:
        half = nn.functional.rms_norm(x.unflatten(-1, (2, 16)), (16,), None, 1e-6)
        return half.flatten(-2) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_the_form_of_a_norm_is_told_from_the_others(rule: Rule, dtype: torch.dtype) -> None:
    class Norm(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return rms_norm_torch(x, self.weight, 1e-6, rule)

    module = nn.Sequential(Norm()).to(dtype)
    fuse_norms(module)
    assert fused_of(module)
    x = torch.randn(500, 32).to(dtype)
    with torch.no_grad():
        got, expected = module(x), rms_norm_torch(x, module[0].weight, 1e-6, rule)
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert (got == expected).float().mean() > (0.99 if dtype is torch.bfloat16 else 0.5)


@pytest.mark.parametrize("kind", [CentredNorm, OtherEps, TwoInputs, GroupNorm])
def test_what_only_looks_like_a_norm_is_left_alone(kind: type[Odd]) -> None:
    module = nn.Sequential(kind())
    fuse_norms(module)
    assert not fused_of(module)


def test_a_forward_that_someone_else_replaced_is_left_alone() -> None:
    model = build_pico("llama")
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x) * 2
    undo = fuse_norms(model)
    assert not is_fused(model.model.norm) and len(fused_of(model)) == 4
    undo()
    assert "forward" in vars(model.model.norm)
