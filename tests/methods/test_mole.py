"""MoLE against the dense oracle: logits, gates, loss and gradients, for every unit and pool, in every family."""

from pathlib import Path
from typing import Any

import pytest
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
from methods.mole_case import NAMES, POOLS, REAL, UNITS, Gated, assert_is_oracle
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


# -- refusals ------------------------------------------------------------------------------------


def test_adapters_are_needed_and_must_differ(tmp_path: Path):
    with pytest.raises(ValueError, match="needs trained adapters"):
        loramux.attach(build_pico("llama"), MoLEConfig())
    gated = Gated(tmp_path)
    config: Any = adapter_of(gated.handle).method.config
    with pytest.raises(ValueError, match="differ"):
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


def test_dora_adapters_are_refused(tmp_path: Path):
    handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=4, use_dora=True))
    copy_lora(handle, lora_params(build_pico("llama"), 4, scale=4.0, dora=True))
    folder = handle.save(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        loramux.attach(build_pico("llama"), MoLEConfig(adapters=(str(folder),)))
