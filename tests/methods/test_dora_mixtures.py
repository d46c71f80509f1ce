"""MiDoRA and MixDoRA: names for MiLoRA and MixLoRA with DoRA experts, exact against the dense oracles of both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loramux
from loramux.methods import load_method
from methods import milora_case, mixlora_case
from methods.bridge import adapter_of, build_double, close, mixlora_params, same_gradients
from pico import build_pico

PAIRS = {"midora": "milora", "mixdora": "mixlora"}


def renamed(handle: loramux.Handle, name: str) -> tuple[nn.Module, loramux.Handle]:
    """The same adapter, attached to a fresh model under the DoRA method of that name."""
    fields = adapter_of(handle).method.config.to_dict()
    model = build_double("llama")
    fresh = loramux.attach(
        model, loramux.config_from_dict({"name": name, **fields}), backend="reference"
    )
    theirs = dict(adapter_of(handle).named_parameters())
    own = dict(adapter_of(fresh).named_parameters())
    assert own.keys() == theirs.keys()
    for key, parameter in own.items():
        parameter.data = theirs[key].detach().clone()
    return model, fresh


def test_midora_is_the_dense_milora_with_dora_modules():
    _, handle, params, modules = milora_case.attached(double=True, dora=True)
    model, handle = renamed(handle, "midora")
    expected, _ = milora_case.oracle_of("llama", params, modules)
    close(milora_case.run(model).detach(), expected.detach())
    assert all(rows.magnitude is not None for rows in adapter_of(handle).rows.values())


def test_a_module_that_midora_leaves_out_is_the_bare_linear():
    """Its magnitudes rescale nothing: whatever they are, the logits stay."""
    _, handle, _, _ = milora_case.attached(double=True, dora=True)
    model, handle = renamed(handle, "midora")
    before = milora_case.run(model).detach()
    chosen = {
        f"{record.path}.{name}"
        for record in handle.routing()
        for name, used in zip(record.columns, (record.gates > 0).any(0).tolist(), strict=True)
        if used
    }
    left_out = adapter_of(handle).rows.keys() - chosen
    assert chosen and left_out
    for path in left_out:
        adapter_of(handle).rows[path].magnitude.data *= 3
    assert torch.equal(milora_case.run(model), before)
    adapter_of(handle).rows[min(chosen)].magnitude.data *= 3
    assert not torch.allclose(milora_case.run(model), before)


@pytest.mark.parametrize("strategy", ["top2", "dynamic", "switch"])
def test_mixdora_needs_one_base_row_per_token_and_expert_at_the_exit_and_gives_it(strategy: str):
    """Outputs and gradients of the loop over whole experts, in double precision."""
    ours, theirs = mixlora_case.STRATEGIES[strategy]
    _, handle, _ = mixlora_case.attached(double=True, dora=True, expert_capacity=99, **ours)
    model, handle = renamed(handle, "mixdora")
    got = mixlora_case.run(model)
    expected, _ = mixlora_case.oracle_of("llama", mixlora_params(handle), True, **theirs)
    real = mixlora_case.REAL
    close(got.detach()[real], expected.detach()[real])
    same_gradients(handle, got[real].square().mean(), expected[real].square().mean())


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_always_dora_and_otherwise_the_method_it_is_named_after(name: str, tmp_path: Path):
    plain: Any = load_method(PAIRS[name]).config_class()
    config: Any = load_method(name).config_class()
    assert config.use_dora and not plain.use_dora
    differ = {k for k, v in config.to_dict().items() if v != plain.to_dict()[k]}
    assert differ == {"use_dora"}
    with pytest.raises(ValueError, match=f"take method {PAIRS[name]}"):
        load_method(name).config_class(use_dora=False)


def test_magnitudes_survive_saving(tmp_path: Path):
    handle = loramux.attach(build_pico("llama"), loramux.MixDoRAConfig(r=4, num_experts=4))
    for rows in adapter_of(handle).rows.values():
        rows.magnitude.data *= 1.5
        rows.b.data.normal_()
    folder = handle.save(tmp_path / "adapter")
    again = adapter_of(loramux.load(build_pico("llama"), folder))
    assert again.method.name == "mixdora"
    for path, rows in adapter_of(handle).rows.items():
        assert torch.equal(again.rows[path].magnitude, rows.magnitude)
