"""Configs: PEFT's field names, values checked when they are made, plain data and back."""

import dataclasses
from typing import Any

import pytest

import loramux
from loramux.methods import config_from_dict, list_methods, load_method, method_names


@pytest.mark.parametrize("name", method_names())
def test_a_config_is_frozen_plain_data_and_back(name: str):
    config = load_method(name).config_class()
    given = {"name": name, **config.to_dict()}
    assert config_from_dict(given) == config
    assert given["name"] == load_method(name).name == config.method
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", method_names())
def test_lists_become_tuples_so_that_a_config_can_be_compared(name: str):
    config = load_method(name).config_class(target_modules=["q_proj"], layers_to_transform=[0])
    assert config.target_modules == ("q_proj",)
    assert config.layers_to_transform == (0,)
    assert config.to_dict()["target_modules"] == ["q_proj"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", {"r": 0}, "r must be"),
        ("lora", {"r": 2.5}, "r must be"),
        ("lora", {"lora_dropout": 1.0}, "lora_dropout"),
        ("lora", {"lora_dropout": -0.1}, "lora_dropout"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("milora", {"top_k": 0}, "top_k"),
        ("milora", {"gate": "hard"}, "gate"),
        ("milora", {"pooler": "avg"}, "pooler"),
        ("milora", {"activation": "silu"}, "activation"),
        ("milora", {"router_norm": "layer"}, "router_norm"),
        ("milora", {"aux_reduction": "max"}, "aux_reduction"),
        ("mixlora", {"top_k": 9}, "top_k must be in 1..num_experts"),
        ("mixlora", {"routing_strategy": "mixtral"}, "routing_strategy"),
        ("mixlora", {"aux_form": "paper"}, "aux_form"),
        ("mixlora", {"top_p": 0.0}, "top_p"),
        ("mixlora", {"sparse_step": 0}, "sparse_step"),
        ("mixlora", {"expert_capacity": 0}, "expert_capacity"),
        ("mole", {"granularity": "site"}, "granularity"),
        ("mole", {"pool": "mean"}, "pool"),
        ("mole", {"use_dora": True}, "use_dora"),
        ("mole", {"lora_dropout": 0.1}, "lora_dropout"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_name(
    name: str, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        config_from_dict({"name": name, **settings})


@pytest.mark.parametrize("name", method_names())
def test_a_misspelt_field_is_refused_with_the_nearest(name: str):
    with pytest.raises(ValueError, match="did you mean 'lora_alpha'"):
        config_from_dict({"name": name, "lora_alpa": 3})


def test_a_misspelt_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'milora'"):
        load_method("miloar")
    with pytest.raises(ValueError, match="needs a 'name'"):
        config_from_dict({"r": 4})


def test_the_four_methods_are_found_with_what_they_are():
    found = {entry["name"]: entry for entry in list_methods()}
    assert {"lora", "milora", "mixlora", "mole"} <= found.keys()
    classes = {name: entry["servability"] for name, entry in found.items()}
    assert classes["lora"] == "static"
    assert classes["milora"] == "per_request"
    assert classes["mixlora"] == classes["mole"] == "per_token"
    assert all(all(entry.values()) for entry in found.values())


def test_defaults_are_the_papers():
    milora, mixlora = loramux.MiLoRAConfig(), loramux.MixLoRAConfig()
    assert (milora.r, milora.top_k, milora.router_aux_loss_coef) == (32, 3, 1e-2)
    assert milora.lora_alpha == milora.r and loramux.MiLoRAConfig(r=8).lora_alpha == 8
    assert (mixlora.r, mixlora.lora_alpha, mixlora.lora_dropout) == (16, 32, 0.05)
    assert (mixlora.num_experts, mixlora.top_k, mixlora.router_init_range) == (8, 2, 0.02)
    switch = loramux.MixLoRAConfig(routing_strategy="mixlora-switch")
    assert (switch.router_init_range, switch.jitter_noise, switch.expert_capacity) == (
        1.0,
        0.01,
        32,
    )
    assert loramux.MoLEConfig().router_aux_loss_coef == 0.5
    assert loramux.LoraConfig().scale_at("any") == 2.0
    assert loramux.LoraConfig(use_rslora=True, r=4).scale_at("any") == 8.0
