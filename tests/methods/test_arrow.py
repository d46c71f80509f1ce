"""Arrow against the dense oracle, saved and loaded, masked, generating, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loramux
from loramux.methods.arrow import ArrowConfig
from methods.bridge import LORA_FAMILIES, adapter_of, close, copy_lora
from methods.frozen_case import IDS, MASK, REAL, Frozen, piecewise
from methods.test_arrow_oracles import routed
from oracles import arrow
from oracles.random_params import lora_params
from pico import build_pico


def assert_is_oracle(made: Frozen, k: int, temperature: float = 1.0) -> None:
    expected, weights = arrow.oracle_logits(made.base(), IDS, MASK, made.experts, k, temperature)
    close(made.run().detach()[REAL], expected.detach()[REAL], 2e-5)
    for path, record in made.records().items():
        close(record.gates[REAL.reshape(-1)], weights[path].detach()[REAL], 2e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_logits_and_weights_are_the_oracles(tmp_path: Path, k: int, temperature: float):
    made = routed(tmp_path, top_k=k, router_temperature=temperature, double=False)
    assert_is_oracle(made, k, temperature)


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_logits_and_weights_are_the_oracles_in_every_family(tmp_path: Path, family: str):
    assert_is_oracle(routed(tmp_path, family=family, double=False), 2)


def test_nothing_trains_and_nothing_of_the_router_is_saved(tmp_path: Path):
    made = routed(tmp_path / "adapters", double=False)
    assert not made.handle.trainable_parameters()
    expected = made.run()
    folder = made.handle.save(tmp_path / "mixture")
    assert not load_file(folder / "router.safetensors")
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    assert torch.equal(loaded.model(input_ids=IDS, attention_mask=MASK).logits, expected)
    ours = adapter_of(loaded).routers
    for path, router in made.routers.items():
        assert torch.equal(ours[path].prototypes, router.prototypes)


def test_token_by_token_the_logits_are_those_of_the_whole(tmp_path: Path):
    made = routed(tmp_path, double=False)
    made.handle.dispatch.requested_backend = "auto"
    whole = made.run(IDS[:1], None).detach()
    close(piecewise(made.model, IDS[:1], [3, 1, 1, 1]), whole, 2e-5)


def test_a_masked_adapter_is_not_chosen_and_with_all_but_one_masked_that_one_acts(tmp_path: Path):
    made = routed(tmp_path)
    made.handle.mask_experts({"green": False})
    made.run()
    assert all(r.gates[:, 1].eq(0).all() for r in made.records().values())
    assert all((r.gates > 0).sum(-1).eq(2).all() for r in made.records().values())
    made.handle.mask_experts({"green": False, "blue": False})
    close(made.run().detach()[REAL], made.alone(0)[REAL])


def test_a_linear_whose_only_adapter_is_masked_is_the_base(tmp_path: Path):
    experts = routed(tmp_path / "whole", double=False).experts
    holes = {s: [e[0] if "mlp" in s else None, e[1]] for s, e in experts.items()}
    made = routed(tmp_path / "holes", experts=holes, double=False)
    made.handle.mask_experts({"green": False})
    close(made.run().detach()[REAL], made.alone(0)[REAL])


def test_the_usual_k_is_three_or_all_where_there_are_fewer(tmp_path: Path):
    for number in (2, 4):
        made = routed(tmp_path / str(number), ranks=(2,) * number, top_k=None, double=False)
        assert {router.top_k for router in made.routers.values()} == {min(3, number)}


def test_prototypes_move_with_the_model_and_keep_their_precision(tmp_path: Path):
    made = routed(tmp_path, double=False)
    router: Any = made.routers["model.layers.0.mlp.down_proj"]
    assert router.prototypes.dtype == torch.float32
    assert "prototypes" not in router.state_dict()
    assert "prototypes" in dict(router.named_buffers())


def test_a_model_that_is_made_bfloat16_does_not_round_the_prototypes(tmp_path: Path):
    made = routed(tmp_path, double=False)
    before = {path: router.prototypes.clone() for path, router in made.routers.items()}
    made.model.to(torch.bfloat16)
    for path, router in made.routers.items():
        assert router.prototypes.dtype == torch.float32
        assert torch.equal(router.prototypes, before[path])
    assert made.run().isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, r"1\.\.2"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"router_temperature": -1.0}, "router_temperature"),
        ({"lora_dropout": 0.1}, "lora_dropout does not apply"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ArrowConfig(adapters=("x/red", "x/green"), **options)


def test_adapters_are_needed_and_dora_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="needs trained adapters"):
        loramux.attach(build_pico("llama"), ArrowConfig())
    handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=4, use_dora=True))
    copy_lora(handle, lora_params(build_pico("llama"), 4, scale=4.0, dora=True))
    folder = handle.save(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        loramux.attach(build_pico("llama"), ArrowConfig(adapters=(str(folder),)))
