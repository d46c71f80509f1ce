"""MixLoRA against the dense oracle: every strategy, family and form of the loss; logits, routing, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loramux
from methods.bridge import (
    LORA_FAMILIES,
    adapter_of,
    build_double,
    close,
    copy_mixlora,
    finite_differences,
    mixlora_params,
    same_gradients,
)
from methods.mixlora_case import (
    EXPERTS,
    MASK,
    RANK,
    REAL,
    STRATEGIES,
    assert_is_oracle,
    attached,
    oracle_of,
    run,
)
from oracles import mixlora_model
from oracles.mixlora_model import balance_code, balance_paper
from oracles.random_params import mixlora_params as random_params


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_logits_and_routing_are_the_oracles_for_every_strategy(name: str):
    assert_is_oracle("llama", name, double=True, dora=False)
    assert_is_oracle("llama", name, double=True, dora=True)


@pytest.mark.parametrize("name", ["top2", "dynamic", "switch-published"])
@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_logits_and_routing_are_the_oracles_in_every_family(family: str, name: str):
    """Biases of the exit count once per unit of weight: GPT-2 shows it."""
    assert_is_oracle(family, name, double=False, dora=False)
    assert_is_oracle(family, name, double=True, dora=True)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_gradients_are_the_oracles_in_double_precision(name: str, dora: bool):
    ours, theirs = STRATEGIES[name]
    # The oracle knows no capacity by default; ours must not meet its own in training.
    model, handle, _ = attached(double=True, dora=dora, expert_capacity=99, **ours)
    model.train()
    got = run(model)[REAL].square().mean()
    expected, _ = oracle_of("llama", mixlora_params(handle), True, **theirs)
    same_gradients(handle, got, expected[REAL].square().mean())


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_gradients_are_the_oracles_in_other_families(family: str):
    for dora in (False, True):
        model, handle, _ = attached(family, double=True, dora=dora)
        got = run(model)[REAL].square().mean()
        expected, _ = oracle_of(family, mixlora_params(handle), True)
        same_gradients(handle, got, expected[REAL].square().mean())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_switchs_capacity_counts_the_real_tokens_of_each_request_in_order(side: str):
    """Overflow runs the frozen FFN in training; the oracle restates the count token by token."""
    mask = MASK if side == "right" else MASK.flip(1)
    real = mask.bool()
    settings = {"routing_strategy": "mixlora-switch", "expert_capacity": 1}
    theirs = {"strategy": "mixlora-switch", "capacity": 1}
    model, handle, params = attached(double=True, **settings)
    model.train()
    got = run(model, mask)
    expected, details = oracle_of("llama", params, True, mask, **theirs)
    overflow = torch.stack([route.overflow for route in details["routes"].values()])
    assert overflow.any() and not overflow.all()
    close(got.detach()[real], expected.detach()[real])
    expected, _ = oracle_of("llama", mixlora_params(handle), True, mask, **theirs)
    same_gradients(handle, got[real].square().mean(), expected[real].square().mean())
    model.eval()
    unlimited, _ = oracle_of("llama", params, True, mask, strategy="mixlora-switch")
    close(run(model, mask).detach()[real], unlimited.detach()[real])
    assert (unlimited - expected)[real].abs().max() > 1e-3


def test_published_overflow_gets_nothing_from_the_ffn():
    model, handle, _ = attached(
        double=True,
        routing_strategy="mixlora-switch",
        expert_capacity=1,
        published_parity=True,
    )
    model.train()
    outputs: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(lambda m, i, out: outputs.append(out))
    run(model)
    record = handle.routing()[-1]
    idle = (record.gates == 0).all(-1).view(2, 6)
    assert (idle & REAL).any()
    assert outputs[0][idle & REAL].abs().max() == 0
    assert outputs[0][~idle & REAL].abs().max() > 0.1


# -- the losses ----------------------------------------------------------------------------------


def losses(**settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    ours, theirs = STRATEGIES[settings.pop("strategy")]
    model, handle, params = attached(
        double=True, router_aux_loss_coef=1.0, router_z_loss_coef=1.0, **ours, **settings
    )
    run(model)
    found = {name: value.detach() for name, value in handle.aux_losses().items()}
    _, details = oracle_of("llama", params, True, **theirs)
    return found, details


@pytest.mark.parametrize("strategy", ["top2", "top1", "all"])
def test_the_balanced_form_is_the_codes_per_layer_over_k_without_padding(strategy: str):
    found, details = losses(strategy=strategy)
    assert list(found) == ["default/balance"]
    close(found["default/balance"], details["aux"]["code_per_layer"].detach())


@pytest.mark.parametrize("strategy", ["top2", "top1"])
def test_the_codes_form_pools_the_layers_and_masks_padding(strategy: str):
    found, details = losses(strategy=strategy, aux_form="code")
    close(found["default/balance"], details["aux"]["code_pooled"].detach())


def test_the_codes_form_of_the_dynamic_strategy_masks_nothing():
    found, details = losses(strategy="dynamic", aux_form="code")
    close(found["default/balance"], details["aux_unmasked"]["code_pooled"].detach())


def test_the_balanced_form_of_the_dynamic_strategy_is_divided_by_the_mean_number_chosen():
    found, details = losses(strategy="dynamic")
    mask = REAL.reshape(-1)
    expected = [
        balance_code(route.p, route.selected, mask)
        / route.selected[mask].sum(-1).to(route.p.dtype).mean()
        for route in details["routes"].values()
    ]
    close(found["default/balance"], torch.stack(expected).mean().detach())


def test_the_switch_has_the_papers_form_and_a_loss_on_the_size_of_its_logits():
    found, details = losses(strategy="switch")
    close(found["default/balance"], details["aux"]["paper"].detach())
    close(found["default/z"], details["aux"]["z"].detach())
    found, details = losses(strategy="switch", aux_form="code")
    pooled = torch.cat([route.p for route in details["routes"].values()])
    close(found["default/balance"], balance_paper(pooled).detach())


def test_gradients_of_the_losses_are_the_oracles():
    for strategy, form in (("top2", "code_per_layer"), ("switch", "paper")):
        ours, theirs = STRATEGIES[strategy]
        model, handle, _ = attached(double=True, router_aux_loss_coef=1.0, **ours)
        run(model)
        expected = oracle_of("llama", mixlora_params(handle), True, **theirs)[1]["aux"]
        same_gradients(handle, handle.aux_losses()["default/balance"], expected[form])
        if strategy == "switch":
            same_gradients(handle, handle.aux_losses()["default/z"], 1e-3 * expected["z"])


def test_the_default_coefficient_belongs_to_the_form():
    assert loramux.MixLoRAConfig().router_aux_loss_coef == 2e-3
    assert loramux.MixLoRAConfig(aux_form="code").router_aux_loss_coef == 1e-3
    assert loramux.MixLoRAConfig(router_aux_loss_coef=0.5).router_aux_loss_coef == 0.5


# -- which sites hold experts --------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        ("down_proj",),
        ("gate_proj",),
        ("up_proj", "down_proj"),
        ("q_proj", "gate_proj", "up_proj"),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_experts_may_sit_at_some_of_the_ffns_linears_only(targets: tuple[str, ...], dora: bool):
    model = build_double()
    full = random_params(model, EXPERTS, RANK, scale=1.5, dora=dora)
    experts = {
        path: [{n: f for n, f in expert.items() if n in targets} for expert in every]
        for path, every in full.experts.items()
    }
    linears = {p: e for p, e in full.linears.items() if p.endswith(targets)}
    params = mixlora_model.Params(linears, full.routers, experts)
    config = loramux.MixLoRAConfig(
        r=RANK,
        lora_alpha=1.5 * RANK,
        num_experts=EXPERTS,
        lora_dropout=0.0,
        use_dora=dora,
        target_modules=targets,
    )
    handle = loramux.attach(model, config, backend="reference")
    copy_mixlora(handle, params)
    got = run(model).detach()
    expected, _ = oracle_of("llama", params, True)
    close(got[REAL], expected.detach()[REAL])
    handle.detach()
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_every_nth_layer_may_be_sparse_and_the_others_hold_plain_lora():
    model = build_double()
    config = loramux.MixLoRAConfig(r=RANK, num_experts=EXPERTS, sparse_step=2, lora_dropout=0.0)
    handle = loramux.attach(model, config, backend="reference")
    adapter = adapter_of(handle)
    assert list(adapter.routers) == ["model.layers.0.mlp"]
    assert adapter.rows["model.layers.0.mlp.up_proj"].spans.num_slots == EXPERTS
    assert adapter.rows["model.layers.1.mlp.up_proj"].spans.num_slots == 1


def test_a_mixture_without_experts_is_refused(pico: nn.Module):
    with pytest.raises(ValueError, match="at least one FFN linear"):
        loramux.attach(pico, loramux.MixLoRAConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.parametrize("strategy", ["top2", "dynamic"])
def test_gradients_are_those_of_finite_differences(family: str, strategy: str):
    model, handle, _ = attached(family, double=True, **STRATEGIES[strategy][0])
    leaves = {
        name: p
        for name, p in handle.trainable_parameters().items()
        if "h/1" in name and ("mlp" in name or "c_attn" in name)
    }
    assert len(leaves) == 7

    def value() -> Tensor:
        return run(model)[REAL].square().mean() + sum(handle.aux_losses().values())

    finite_differences(value, leaves, samples=3)
