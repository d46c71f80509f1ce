"""Invariant 1: an empty route is the bare base, bit by bit, and `detach` leaves no trace."""

from typing import Any

import pytest
import torch
from torch import nn

import loramux
from conformance.cases import (
    IDS,
    LABELS,
    MASK,
    Maker,
    Variant,
    crossed,
    every_variant,
    first_variants,
    logits_of,
    named,
    trace,
)
from pico import FAMILIES, build_pico

VARIANTS = [pytest.param(v, id=v.name) for v in every_variant()]
FIRST = [pytest.param(v, id=v.name) for v in first_variants()]


def zero_b(handle: loramux.Handle) -> None:
    for rows in handle.adapters["default"].rows.values():
        rows.b.data.zero_()


@pytest.mark.parametrize(
    ("variant", "family"),
    [case for case in crossed(*FAMILIES[1:]) if case[0].starts_as_base],
    ids=named,
)
def test_an_adapter_whose_b_is_zero_is_the_base(make: Maker, variant: Variant, family: str):
    model = build_pico(family)
    base = logits_of(model)
    handle = make.attach(model, variant, family, trained=False)
    zero_b(handle)
    got = logits_of(model)
    torch.testing.assert_close(got, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_adapter_changes_the_logits(make: Maker, variant: Variant):
    model = build_pico("llama")
    base = logits_of(model)
    make.attach(model, variant)
    assert (logits_of(model) - base)[MASK.bool()].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", FIRST)
def test_an_empty_route_is_bit_identical_to_the_base(make: Maker, variant: Variant, family: str):
    model = build_pico(family)
    base = logits_of(model)
    handle = make.attach(model, variant, family)
    with handle.batch(adapters=[None, None]):
        assert torch.equal(logits_of(model), base)
    handle.use(None)
    assert torch.equal(logits_of(model), base)
    handle.use("default")
    assert not torch.equal(logits_of(model), base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_request_without_adapter_is_the_base_beside_one_that_has_one(
    make: Maker, variant: Variant
):
    model = build_pico("llama")
    base = logits_of(model)
    handle = make.attach(model, variant)
    with handle.batch(adapters=[None, "default"]):
        got = logits_of(model)
    torch.testing.assert_close(got[0], base[0], atol=1e-5, rtol=1e-5)
    assert (got[1] - base[1]).abs().max() > 1e-3


def used(model: nn.Module, handle: loramux.Handle) -> None:
    """A training step with checkpointing, a generation, and a call for nobody."""
    model.train()
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    model.eval()
    model.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False)
    with handle.batch(adapters=[None, "default"]):
        logits_of(model)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("variant", FIRST)
def test_detach_restores_every_module_hook_flag_and_method(
    make: Maker, variant: Variant, family: str
):
    model = build_pico(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before, base = trace(model), logits_of(model)
    handle = make.attach(model, variant, family)
    used(model, handle)
    assert loramux.handle_of(model) is handle
    handle.detach()
    assert trace(model) == before
    assert loramux.handle_of(model) is None
    assert torch.equal(logits_of(model), base)


def test_a_model_can_be_attached_again_after_detach(make: Maker, pico: nn.Module):
    first = make.attach(pico, first_variants()[0])
    expected = logits_of(pico)
    first.detach()
    make.attach(pico, first_variants()[0])
    assert torch.equal(logits_of(pico), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj"]}, "q_porj"),
        ({"layers_to_transform": [0, 7]}, "7"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no linear"),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model_untouched(
    pico: nn.Module, settings: dict[str, Any], message: str
):
    before = trace(pico)
    with pytest.raises(ValueError, match=message):
        loramux.attach(pico, loramux.LoraConfig(r=4, **settings))
    assert trace(pico) == before


def test_attaching_twice_is_refused_and_names_the_way_out(make: Maker, pico: nn.Module):
    make.attach(pico, first_variants()[0])
    before = trace(pico)
    with pytest.raises(ValueError, match=r"handle\.add"):
        loramux.attach(pico, loramux.LoraConfig(r=4))
    assert trace(pico) == before
