"""LoRA-Flow against the dense oracle, its options, its refusals, and whether it finds the adapter that knows."""

from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from loramux.methods.loraflow import LoRAFlowConfig
from methods.bridge import LORA_FAMILIES, close, finite_differences, same_gradients
from methods.frozen_case import IDS, MASK, REAL, Frozen
from methods.planted import planted, shares_after_training
from methods.test_loraflow_oracles import flow
from oracles import loraflow
from pico import build_pico

UNITS: tuple[loraflow.Granularity, ...] = ("layer", "module", "step")


def params_of(made: Frozen) -> loraflow.Params:
    gates = {path: loraflow.Gate(r.weight, r.bias) for path, r in made.routers.items()}
    return loraflow.Params(made.experts, gates)


def assert_is_oracle(made: Frozen, config: loraflow.Config) -> None:
    expected, weights = loraflow.oracle_logits(made.base(), IDS, MASK, params_of(made), config)
    close(made.run().detach()[REAL], expected.detach()[REAL])
    records = made.records()
    for unit, record in records.items():
        close(record.gates.detach()[REAL.reshape(-1)], weights[unit].detach()[REAL])


@pytest.mark.parametrize("granularity", UNITS)
def test_logits_and_weights_are_the_oracles(tmp_path: Path, granularity: loraflow.Granularity):
    made = flow(tmp_path, 0.3, granularity=granularity, temperature=1.1)
    assert_is_oracle(made, loraflow.Config(granularity, 1.1))
    gates = {"layer": 2, "module": 14, "step": 1}
    assert len(made.records()) == gates[granularity]


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_logits_and_weights_are_the_oracles_in_every_family(tmp_path: Path, family: str):
    assert_is_oracle(flow(tmp_path, 0.3, family=family, double=False), loraflow.Config())


def test_a_bias_inside_the_softmax_is_another_model(tmp_path: Path):
    made = flow(tmp_path, 0.3, bias_inside=True)
    assert_is_oracle(made, loraflow.Config(bias_inside=True))
    assert all(
        torch.allclose(r.gates.sum(-1), torch.ones(12).double()) for r in made.records().values()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("granularity", UNITS)
def test_gradients_are_the_oracles(
    tmp_path: Path, granularity: loraflow.Granularity, checkpointing: bool
):
    made = flow(tmp_path, 0.3, granularity=granularity)
    if checkpointing:
        made.model.gradient_checkpointing_enable({"use_reentrant": False})
        made.model.train()
    got = made.run()[REAL].square().mean()
    base = made.base().requires_grad_(False)
    expected, _ = loraflow.oracle_logits(
        base, IDS, MASK, params_of(made), loraflow.Config(granularity)
    )
    same_gradients(made.handle, got, expected[REAL].square().mean())


def test_gradients_are_those_of_finite_differences(tmp_path: Path):
    made = flow(tmp_path, 0.2, family="gpt2", granularity="step")
    finite_differences(
        lambda: made.run()[REAL].square().mean(), made.handle.trainable_parameters(), samples=3
    )


def test_a_static_gate_has_biases_only(tmp_path: Path):
    made = flow(tmp_path, static=True)
    assert [p.shape for p in made.handle.trainable_parameters().values()] == [(3,), (3,)]


def test_an_adapter_that_leaves_layers_out_adds_nothing_there(tmp_path: Path):
    whole = flow(tmp_path / "whole", 0.3)
    holes = {
        site: [*entries[:2], entries[2] if "layers.1" in site else None]
        for site, entries in whole.experts.items()
    }
    made = flow(tmp_path / "holes", 0.3, experts=holes)
    assert_is_oracle(made, loraflow.Config())


def test_the_penalty_is_the_mean_square_distance_of_the_sum_from_one(tmp_path: Path):
    made = flow(tmp_path, 0.3, sum_penalty_coef=2.0)
    made.model.train()
    made.run()
    terms = [router.bias.sum().square() for router in made.routers.values()]
    loss = made.handle.aux_losses()["default/sum"]
    torch.testing.assert_close(loss, 2 * torch.stack(terms).mean())
    assert not flow(tmp_path / "off", 0.3).handle.aux_losses()


def test_a_masked_adapter_has_no_weight_and_the_others_renormalise(tmp_path: Path):
    made = flow(tmp_path, 0.3)
    made.handle.mask_experts({"green": False})
    made.run()
    for path, record in made.records().items():
        bias = made.routers[path].bias[[0, 2]].sum()
        assert record.gates[:, 1].eq(0).all()
        torch.testing.assert_close(record.gates.sum(-1), (1 + bias).expand(12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "anchor:purple"}, r"'purple'; there are \['red', 'green', 'blue'\]"),
        ({"init": "green"}, "'uniform' or 'anchor:ADAPTER', got 'green'"),
        ({"init": "anchor:red", "bias_inside": True}, "cannot start at one adapter"),
        ({"temperature": 0.0}, "temperature"),
        ({"granularity": "token"}, "granularity must be one of"),
        ({"use_dora": True}, "use_dora does not apply"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LoRAFlowConfig(adapters=("x/red", "x/green", "x/blue"), **options)


def test_adapters_are_needed():
    with pytest.raises(ValueError, match="needs trained adapters"):
        loramux.attach(build_pico("llama"), LoRAFlowConfig())


@pytest.mark.parametrize("granularity", UNITS)
def test_the_adapter_that_knows_the_task_is_found(
    tmp_path: Path, granularity: loraflow.Granularity
):
    folders, batch = planted(tmp_path)
    config = LoRAFlowConfig(adapters=folders, granularity=granularity)
    shares = shares_after_training(config, batch)
    assert shares["knows"] > 1.5 * max(shares["noise"], shares["other"])
