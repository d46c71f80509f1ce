"""Where experts can sit: every linear of every decoder layer, its block, its role and its order."""

from typing import Any

import pytest
from torch import nn

import loramux
from loramux.core.sites import find_sites, select_sites
from oracles.random_params import layer_linears
from pico import FAMILIES, build_pico

ENTERS = {"gate_proj", "up_proj", "gate_up_proj", "c_fc"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_layer_is_a_site_and_the_head_is_not(family: str):
    model = build_pico(family)
    sites = find_sites(model)
    assert sorted(site.path for site in sites) == sorted(layer_linears(model))
    assert all("lm_head" not in site.path for site in sites)
    for site in sites:
        assert site.path == f"{site.layer_path}.{site.name}"
        assert site.block == site.path.rpartition(".")[0]
        weight = model.get_submodule(site.path).weight
        shape = (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
        assert tuple(weight.shape) == shape
        assert site.d_model == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ffn_has_entries_and_one_exit_and_attention_is_plain(family: str):
    for site in find_sites(build_pico(family)):
        last = site.name.rpartition(".")[2]
        if site.kind == "ffn":
            assert ".mlp." in site.path
            assert site.role == ("enter" if last in ENTERS else "exit")
        else:
            assert site.kind == "attention"
            assert site.role == "plain"


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_come_in_the_order_in_which_they_run(family: str):
    model = build_pico(family)
    ran: list[str] = []
    for name in layer_linears(model):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    model(model.dummy_inputs["input_ids"] % 90)
    blocks = [site.path for site in find_sites(model)]
    assert [name for name in ran if not name.endswith(("k_proj", "v_proj", "up_proj"))] == [
        name for name in blocks if not name.endswith(("k_proj", "v_proj", "up_proj"))
    ]
    assert sorted(ran) == sorted(blocks)


def paths(model: nn.Module, **settings: Any) -> list[str]:
    chosen = select_sites(find_sites(model), loramux.LoraConfig(**settings))
    return [site.path.removeprefix("model.layers.") for site in chosen]


def test_targets_are_names_full_paths_or_one_regular_expression(pico: nn.Module):
    assert paths(pico, target_modules=["q_proj"]) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert paths(pico, target_modules=["model.layers.1.mlp.up_proj"]) == ["1.mlp.up_proj"]
    assert paths(pico, target_modules=["mlp.up_proj"], layers_to_transform=[1]) == ["1.mlp.up_proj"]
    assert paths(pico, target_modules=r".*\.1\.mlp\.(up|down)_proj") == [
        "1.mlp.up_proj",
        "1.mlp.down_proj",
    ]
    assert len(paths(pico, target_modules="all-linear")) == len(paths(pico)) == 14
    assert len(paths(pico, exclude_modules=["q_proj", "k_proj"])) == 10


def test_a_name_is_not_a_suffix(pico: nn.Module):
    """PEFT's rule: `proj` matches no `q_proj`."""
    with pytest.raises(ValueError, match="'proj'.*self_attn.q_proj"):
        paths(pico, target_modules=["proj"])


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_every_name_must_match_something(pico: nn.Module, field: str):
    with pytest.raises(ValueError, match=f"{field} names 'gate'"):
        paths(pico, **{field: ["q_proj", "gate"]})


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(ValueError, match="no list of decoder layers"):
        loramux.attach(nn.Sequential(nn.Linear(4, 4)), loramux.LoraConfig())


def test_an_empty_regular_expression_and_one_that_matches_nothing_are_refused(pico: nn.Module):
    with pytest.raises(ValueError, match="matches"):
        paths(pico, target_modules="nothing")
