"""Configs: PEFT's field names, values checked when they are made, plain data and back."""

import dataclasses
import math
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
        ("lora", {"r": True}, "r must be .* got True"),
        ("lora", {"r": "8"}, "r must be"),
        ("lora", {"lora_alpha": math.nan}, "lora_alpha must be .* got nan"),
        ("lora", {"lora_alpha": math.inf}, "lora_alpha"),
        ("lora", {"lora_alpha": -1}, "lora_alpha"),
        ("lora", {"lora_alpha": 0}, "lora_alpha"),
        ("lora", {"lora_alpha": "16"}, "lora_alpha"),
        ("lora", {"lora_alpha": True}, "lora_alpha"),
        ("lora", {"lora_dropout": "0.1"}, "lora_dropout"),
        ("lora", {"lora_dropout": math.nan}, "lora_dropout"),
        ("lora", {"rank_pattern": {"q_proj": 0}}, "rank_pattern.*q_proj.* got 0"),
        ("lora", {"rank_pattern": {"q_proj": -2}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"q_proj": 2.0}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"q_proj": True}}, "rank_pattern"),
        ("lora", {"rank_pattern": [4]}, "rank_pattern must map"),
        ("lora", {"rank_pattern": {"q_proj(": 4}}, "rank_pattern must be a regular expression"),
        ("lora", {"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.*q_proj"),
        ("lora", {"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern"),
        ("lora", {"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern"),
        ("lora", {"target_modules": "(q_proj"}, "target_modules must be a regular expression"),
        ("lora", {"exclude_modules": "*"}, "exclude_modules must be a regular expression"),
        ("lora", {"target_modules": 3}, "target_modules must be a list"),
        ("lora", {"target_modules": [3]}, "target_modules must be a list"),
        ("lora", {"layers_to_transform": "5"}, "layers_to_transform must be"),
        ("lora", {"layers_to_transform": [-1]}, "layers_to_transform must be"),
        ("lora", {"layers_to_transform": True}, "layers_to_transform must be"),
        ("lora", {"lora_dropout": 1.0}, "lora_dropout"),
        ("lora", {"lora_dropout": -0.1}, "lora_dropout"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("milora", {"top_k": 0}, "top_k"),
        ("milora", {"top_k": 2.5}, "top_k must be an integer from 1, got 2.5"),
        ("milora", {"top_k": True}, "top_k"),
        ("milora", {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
        ("milora", {"router_init_range": math.nan}, "router_init_range"),
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
        ("mixlora", {"top_k": 1.5}, "top_k"),
        ("mixlora", {"num_experts": 4.0}, "num_experts"),
        ("mixlora", {"num_experts": "8"}, "num_experts"),
        ("mixlora", {"expert_r": 0}, "expert_r must be at least 1, got 0"),
        ("mixlora", {"expert_alpha": -1.0}, "expert_alpha"),
        ("mixlora", {"temperature": -0.5}, "temperature must be .* got -0.5"),
        ("mixlora", {"jitter_noise": -0.1}, "jitter_noise"),
        ("mixlora", {"jitter_noise": 1.0}, "jitter_noise must be .* got 1.0"),
        ("mixlora", {"router_aux_loss_coef": -1e-3}, "router_aux_loss_coef"),
        ("mixlora", {"router_aux_loss_coef": math.nan}, "router_aux_loss_coef"),
        ("mixlora", {"router_z_loss_coef": math.inf}, "router_z_loss_coef"),
        ("mixlora", {"top_p": "0.8"}, "top_p"),
        ("mole", {"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
        ("mole", {"adapters": "runs/one"}, "adapters must be a list of folders"),
        ("mole", {"granularity": "site"}, "granularity"),
        ("mole", {"pool": "median"}, "pool"),
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


def test_one_layer_may_be_given_as_a_number():
    assert loramux.LoraConfig(layers_to_transform=5).layers_to_transform == (5,)  # type: ignore[arg-type]
    assert loramux.LoraConfig(layers_to_transform=0).layers_to_transform == (0,)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_targeted_linear_is_refused_by_its_key(field: str):
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    config = loramux.LoraConfig(**{field: {"q_proj": 2, r".*\.0\.mlp\..*": 4}})
    config.check_patterns(paths)
    with pytest.raises(ValueError, match=rf"{field} names 'q_proj', which no targeted"):
        config.check_patterns(paths[1:])
    with pytest.raises(ValueError, match="'proj'"):
        loramux.LoraConfig(**{field: {"proj": 2}}).check_patterns(paths)  # no end at a dot


def test_a_gate_that_is_fixed_per_prompt_can_be_served_per_request():
    method = load_method("mole")
    assert method(loramux.MoLEConfig(pool="prompt_mean")).servability == "per_request"
    assert method(loramux.MoLEConfig()).servability == method.servability == "per_token"


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


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("value", ["no", "false", 0, None])
def test_every_switch_of_every_method_is_true_or_false_and_nothing_else(name: str, value: Any):
    config_class = load_method(name).config_class
    switches = [f.name for f in dataclasses.fields(config_class) if f.type == "bool"]
    assert {"use_rslora", "use_dora"} <= set(switches)
    for switch in switches:
        with pytest.raises(ValueError, match=f"{switch} must be true or false, got"):
            config_class(**{switch: value})
