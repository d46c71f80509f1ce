"""The LoRA oracle against PEFT itself, and the identities a fresh adapter must keep."""

import peft
import pytest
import torch
from torch import nn

from oracles.lora import (
    LowRank,
    adapted_linear,
    initial_magnitude,
    lora_scale,
    merged_weight,
    oracle_logits,
    parameter_count,
)
from oracles.random_params import layer_linears, layer_modules, lora_params
from oracles.surgery import model_logits
from pico import FAMILIES, build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def peft_with_random_factors(family: str, **config) -> tuple[nn.Module, dict[str, LowRank]]:
    """A PEFT model with every factor (and magnitude) random, and the same numbers as LowRank."""
    base = build_pico(family)
    targets = sorted({name.split(".")[-1] for name in layer_modules(base)})
    paths = layer_linears(base)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        fan_in_fan_out=family == "gpt2",
        **config,
    )
    model = peft.get_peft_model(base, lora).eval()
    scale = lora_scale(6, 4, config.get("use_rslora", False))
    draw, params = torch.Generator().manual_seed(3), {}
    for path in paths:
        site = model.base_model.model.get_submodule(path)
        A, B = site.lora_A["default"].weight, site.lora_B["default"].weight
        for tensor in (A, B):
            tensor.data = 0.15 * torch.randn(tensor.shape, generator=draw)
        magnitude = None
        if config.get("use_dora"):
            magnitude = site.lora_magnitude_vector["default"].weight
            magnitude.data *= 1 + 0.2 * torch.randn(magnitude.shape, generator=draw)
        params[path] = LowRank(A, B, scale, magnitude)
    return model, params


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_the_oracle_gives_the_logits_of_peft(family, variant):
    flags = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[variant]
    model, params = peft_with_random_factors(family, **flags)
    expected = model_logits(model, IDS, MASK)
    base = build_pico(family)
    got = oracle_logits(base, IDS, MASK, params)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - model_logits(base, IDS, MASK)).abs().max() > 0.1


def test_dora_gradients_are_those_of_peft():
    model, params = peft_with_random_factors("llama", use_dora=True)
    leaves = [t for e in params.values() for t in (e.A, e.B, e.magnitude)]
    expected = torch.autograd.grad(
        model_logits(model, IDS, MASK)[MASK.bool()].square().sum(), leaves
    )
    logits = oracle_logits(build_pico("llama"), IDS, MASK, params)
    got = torch.autograd.grad(logits[MASK.bool()].square().sum(), leaves)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_a_zero_b_leaves_the_base_logits_bit_identical(pico):
    params = {p: e._replace(B=torch.zeros_like(e.B)) for p, e in lora_params(pico).items()}
    assert torch.equal(oracle_logits(pico, IDS, MASK, params), model_logits(pico, IDS, MASK))


def test_dora_starts_as_the_base_when_its_magnitude_is_the_row_norm(pico):
    params = {}
    for path, expert in lora_params(pico).items():
        magnitude = initial_magnitude(pico.get_submodule(path).weight)
        params[path] = expert._replace(B=torch.zeros_like(expert.B), magnitude=magnitude)
    got = oracle_logits(pico, IDS, MASK, params)
    torch.testing.assert_close(got, model_logits(pico, IDS, MASK), atol=1e-6, rtol=1e-6)


def test_the_model_is_itself_again_after_the_oracle_ran(pico):
    before = model_logits(pico, IDS, MASK)
    oracle_logits(pico, IDS, MASK, lora_params(pico))
    assert torch.equal(model_logits(pico, IDS, MASK), before)
    assert not any("forward" in vars(module) for module in pico.modules())


def test_merging_with_weights_equals_adding_weighted_updates():
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    experts = [
        LowRank(
            torch.randn(r, 7, generator=draw, dtype=torch.float64),
            torch.randn(5, r, generator=draw, dtype=torch.float64),
            scale=0.5 * r,
        )
        for r in (2, 3)
    ]
    x = torch.randn(4, 7, generator=draw, dtype=torch.float64)
    weighted = [0.25 * (adapted_linear(x, W, None, e) - x @ W.T) for e in experts]
    expected = x @ W.T + sum(weighted)
    torch.testing.assert_close(x @ merged_weight(W, experts, [0.25, 0.25]).T, expected)


def test_rslora_scales_by_the_root_of_the_rank():
    assert lora_scale(16, 4) == 4.0
    assert lora_scale(16, 4, rslora=True) == 8.0


def test_rank_80_on_all_seven_projections_of_llama_2_7b_counts_199_884_800():
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(d, f), (d, f), (f, d)]
    assert 32 * parameter_count(shapes, 80) == 199_884_800
