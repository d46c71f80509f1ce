"""MiLoRA against the dense oracle: logits, routing, loss and gradients, in every setting and family."""

import pytest
import torch
from torch import Tensor, nn

import loramux
from methods.bridge import (
    LORA_FAMILIES,
    build_double,
    by_layer,
    close,
    copy_milora,
    finite_differences,
    milora_params,
    same_gradients,
)
from methods.milora_case import (
    CONFIGS,
    IDS,
    LABELS,
    RANK,
    assert_is_oracle,
    attached,
    oracle_of,
    run,
)
from oracles.random_params import milora_params as random_params


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_routing_and_loss_are_the_oracles_in_every_setting(name: str):
    assert_is_oracle("llama", name, double=True, dora=False)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_logits_routing_and_loss_are_the_oracles_in_every_family(family: str, dora: bool):
    assert_is_oracle(family, "default", double=False, dora=dora)
    assert_is_oracle(family, "prob", double=True, dora=dora)


@pytest.mark.parametrize("name", ["default", "prob", "renorm"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_gradients_are_the_oracles_in_double_precision(family: str, name: str):
    ours, theirs = CONFIGS[name]
    model, handle, _, modules = attached(family, double=True, **ours)
    got = run(model)
    auxiliary = handle.aux_losses()["default/balance"]
    expected, details = oracle_of(family, milora_params(handle, modules), modules, **theirs)
    same_gradients(
        handle,
        got.square().mean() + auxiliary,
        expected.square().mean() + 0.01 * details["aux"],
    )


@pytest.mark.parametrize("name", ["prob", "renorm"])
def test_gradients_are_those_of_finite_differences(name: str):
    """Straight-through gates are constant going forward, so finite differences apply to the other two."""
    model, handle, _, _ = attached("gpt2", double=True, **CONFIGS[name][0])
    leaves = {
        parameter: p
        for parameter, p in handle.trainable_parameters().items()
        if "routers" in parameter or ("h/1" in parameter and "c_" in parameter)
    }

    def value() -> Tensor:
        return run(model).square().mean() + handle.aux_losses()["default/balance"]

    slopes = torch.autograd.grad(value(), list(leaves.values()), allow_unused=True)
    used = {n: p for (n, p), g in zip(leaves.items(), slopes, strict=True) if g is not None}
    assert len([name for name in used if "routers" in name]) == 8
    finite_differences(value, used, samples=2)


def test_a_choice_of_modules_is_routed_among_itself():
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    model = build_double()
    params = random_params(model, RANK, modules=modules)
    config = loramux.MiLoRAConfig(r=RANK, top_k=2, target_modules=modules)
    handle = loramux.attach(model, config, backend="reference")
    copy_milora(handle, params, modules)
    got = run(model).detach()
    expected, details = oracle_of("llama", params, modules, top_k=2)
    close(got, expected.detach())
    close(by_layer(handle.routing(), modules).detach(), details["gates"].detach())


# -- refusals ------------------------------------------------------------------------------------


def test_more_modules_per_prompt_than_a_layer_has_are_refused(pico: nn.Module):
    with pytest.raises(ValueError, match="fewer than top_k=3"):
        loramux.attach(pico, loramux.MiLoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_a_sample_without_a_prompt_is_refused_with_its_number():
    model, _, _, _ = attached()
    model.train()
    labels = LABELS.clone()
    labels[1] = IDS[1]
    with pytest.raises(ValueError, match=r"requests \[1\].*no prompt"):
        model(input_ids=IDS, labels=labels)
    model(input_ids=IDS, labels=LABELS)
