"""MoLE against the dense oracle: logits, gates, loss and gradients, for every unit and pool, in every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from loramux.methods.mole import MoLEConfig
from methods.bridge import (
    LORA_FAMILIES,
    adapter_of,
    close,
    copy_lora,
    copy_mole,
    finite_differences,
    mole_gates,
    same_gradients,
    write_experts,
)
from methods.mole_case import IDS, MASK, NAMES, POOLS, REAL, UNITS, Gated, assert_is_oracle
from methods.planted import planted, shares_after_training
from oracles import mole
from oracles.random_params import lora_params
from pico import build_pico


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("granularity", UNITS)
def test_logits_gates_and_balance_are_the_oracles(
    tmp_path: Path, granularity: mole.Granularity, pool: mole.Pool
):
    assert_is_oracle(Gated(tmp_path, granularity=granularity, pool=pool))


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_logits_and_gates_are_the_oracles_in_every_family(
    tmp_path: Path, family: str, granularity: mole.Granularity
):
    assert_is_oracle(Gated(tmp_path, family, granularity, double=False))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("granularity", UNITS)
def test_gradients_are_the_oracles(tmp_path: Path, granularity: mole.Granularity, pool: mole.Pool):
    gated = Gated(tmp_path, granularity=granularity, pool=pool)
    got = gated.run()[REAL].square().mean() + gated.handle.aux_losses()["default/balance"]
    gates = mole_gates(gated.handle, granularity)
    expected, details = gated.oracle(gated.params._replace(gates=gates))
    total = expected[REAL].square().mean() + 0.5 * details["balance_excess"]
    same_gradients(gated.handle, got, total)


def test_gradients_are_those_of_finite_differences(tmp_path: Path):
    gated = Gated(tmp_path, "gpt2", "layer")

    def value() -> Tensor:
        logits = gated.run()[REAL].square().mean()
        return logits + gated.handle.aux_losses()["default/balance"]

    finite_differences(value, gated.handle.trainable_parameters(), samples=3)


def test_logits_are_the_oracles_where_an_adapter_leaves_sites_out(tmp_path: Path):
    """The third adapter knows layer 1 only: elsewhere it adds nothing, though its gate takes its share."""
    gated = Gated(tmp_path / "whole", granularity="layer")
    holes = {
        site: [*es[:2], es[2] if "layers.1" in site else None]
        for site, es in gated.params.experts.items()
    }
    params = gated.params._replace(experts=holes)
    folders = write_experts(lambda: build_pico("llama"), params, tmp_path, NAMES[:3])
    gated.handle.detach()
    gated.handle = loramux.attach(gated.model, MoLEConfig(adapters=folders), backend="reference")
    copy_mole(gated.handle, params, "layer")
    expected, _ = gated.oracle(params)
    close(gated.run().detach()[REAL], expected.detach()[REAL])


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", UNITS)
def test_the_mean_over_all_tokens_is_the_oracles(tmp_path: Path, granularity: mole.Granularity):
    assert_is_oracle(Gated(tmp_path, granularity=granularity, pool="mean"))


def test_the_mean_over_all_tokens_ignores_padding(tmp_path: Path):
    gated = Gated(tmp_path, pool="mean", double=False)
    both = gated.run().detach()
    alone = gated.run(IDS[1:, :4], MASK[1:, :4], None).detach()
    close(alone[0], both[1, :4])


def test_in_generation_the_mean_over_all_tokens_is_that_over_the_prompt(tmp_path: Path):
    answers = []
    for pool in ("mean", "prompt_mean"):
        model: Any = Gated(tmp_path / pool, pool=pool, double=False).model
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        answers.append(model.generate(IDS[:1], **options))
        assert torch.equal(model.generate(IDS[:1], use_cache=False, **options), answers[-1])
    assert torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("pool", ["token", "prompt_mean", "mean"])
@pytest.mark.parametrize("granularity", UNITS)
def test_a_fast_mask_feeds_zeros_to_the_gates(
    tmp_path: Path, granularity: mole.Granularity, pool: mole.Pool
):
    gated = Gated(tmp_path, granularity=granularity, pool=pool, masked_input="fast")
    mask = (True, False, True)
    gated.handle.mask_experts(dict(zip(NAMES, mask, strict=False)))
    expected, _ = gated.oracle(expert_mask=mask, gate_input="fast")
    exact, _ = gated.oracle(expert_mask=mask)
    close(gated.run().detach()[REAL], expected.detach()[REAL])
    assert (expected - exact)[REAL].abs().max() > 1e-3
    gated.handle.mask_experts(None)
    assert_is_oracle(gated)


@pytest.mark.parametrize("pool", POOLS)
def test_weights_that_sum_to_n_are_the_oracles_and_the_balance_is_that_of_the_gates(
    tmp_path: Path, pool: mole.Pool
):
    gated = Gated(tmp_path, pool=pool, weight_sum="N")
    assert_is_oracle(gated, weight_sum="N")
    sums = [record.gates.sum(-1) for record in gated.records().values()]
    assert all(torch.allclose(total, torch.ones_like(total)) for total in sums)


def test_a_second_mask_replaces_the_first_and_both_at_once_are_their_product(tmp_path: Path):
    gated = Gated(tmp_path, num_experts=4)
    first, second = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([0, 1, 1, 1]).bool()
    gated.run()
    unit = next(iter(gated.records()))
    free = gated.records()[unit].gates
    gated.handle.mask_experts(dict(zip(NAMES, (first & second).tolist(), strict=True)))
    gated.run()
    twice = mole.mask_and_renormalise(mole.mask_and_renormalise(free, first), second)
    torch.testing.assert_close(gated.records()[unit].gates, twice, atol=1e-6, rtol=0)


@pytest.mark.parametrize("granularity", UNITS)
def test_the_adapter_that_knows_the_task_is_found(tmp_path: Path, granularity: mole.Granularity):
    folders, batch = planted(tmp_path)
    config = MoLEConfig(adapters=folders, granularity=granularity)
    shares = shares_after_training(config, batch)
    assert shares["knows"] > 1.25 * max(shares["noise"], shares["other"])


# -- refusals ------------------------------------------------------------------------------------


def test_adapters_are_needed_and_must_differ(tmp_path: Path):
    with pytest.raises(ValueError, match="needs trained adapters"):
        loramux.attach(build_pico("llama"), MoLEConfig())
    gated = Gated(tmp_path)
    config: Any = adapter_of(gated.handle).method.config
    with pytest.raises(ValueError, match="every adapter needs a folder of its own"):
        loramux.attach(build_pico("llama"), MoLEConfig(adapters=(config.adapters[0],) * 2))


def test_adapters_are_named_by_what_tells_their_folders_apart_and_can_always_be_saved(
    tmp_path: Path,
):
    """Training for hours and then not being able to save would be the wrong time to refuse a name."""
    gated = Gated(tmp_path)
    config: Any = adapter_of(gated.handle).method.config
    folders = [tmp_path / "RED Shoes" / "adapter", tmp_path / "Green" / "adapter"]
    for source, folder in zip(config.adapters, folders, strict=False):
        folder.parent.mkdir()
        Path(source).rename(folder)
    handle = loramux.attach(build_pico("llama"), MoLEConfig(adapters=tuple(map(str, folders))))
    assert adapter_of(handle).experts == ("red-shoes", "green")
    saved = handle.save(tmp_path / "mixture")
    assert adapter_of(loramux.load(build_pico("llama"), saved)).experts == ("red-shoes", "green")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "parallel"}, "use execution='additive'"),
        ({"pool": "flatten"}, "one fixed sequence length"),
        ({"pool": "max"}, "pool must be one of"),
        ({"lora_dropout": 0.1}, "lora_dropout does not apply"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MoLEConfig(adapters=("x/red", "x/green"), **options)


def test_dora_adapters_are_refused(tmp_path: Path):
    handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=4, use_dora=True))
    copy_lora(handle, lora_params(build_pico("llama"), 4, scale=4.0, dora=True))
    folder = handle.save(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        loramux.attach(build_pico("llama"), MoLEConfig(adapters=(str(folder),)))
