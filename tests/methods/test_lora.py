"""LoRA, rsLoRA and DoRA against the dense oracle, in the whole model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loramux
from loramux.core.bank import dora_gain
from methods.bridge import (
    LORA_FAMILIES,
    adapter_of,
    build_double,
    close,
    copy_lora,
    finite_differences,
    lora_params,
    same_gradients,
)
from oracles import lora
from oracles.lora import dora_norm, lora_scale
from oracles.random_params import lora_params as random_params
from oracles.surgery import base_weight, model_logits
from pico import FAMILIES, build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def attached(
    family: str, kind: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, loramux.Handle, dict[str, lora.LowRank]]:
    """An adapter of rank 4 with random rows, and the same rows for the oracle. Alpha 6: no scale is a power of two."""
    model = build_double(family) if dtype == torch.float64 else build_pico(family)
    settings = KINDS[kind]
    scale = lora_scale(6, 4, settings.get("use_rslora", False))
    params = random_params(model, 4, scale=scale, dora=kind == "dora")
    config = loramux.LoraConfig(r=4, lora_alpha=6, **settings)
    handle = loramux.attach(model, config, backend="reference")
    copy_lora(handle, params)
    return model, handle, params


def ours(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_logits_are_the_oracles(family: str, kind: str):
    model, handle, params = attached(family, kind)
    got = ours(model).detach()
    handle.detach()
    expected = lora.oracle_logits(model, IDS, MASK, params).detach()
    close(got, expected)
    assert (expected - model_logits(model, IDS, MASK)).abs().max() > 0.1


@pytest.mark.parametrize("family", LORA_FAMILIES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_and_gradients_are_the_oracles_in_double_precision(family: str, kind: str):
    model, handle, _ = attached(family, kind, torch.float64)
    got = ours(model)
    parameters = handle.trainable_parameters()
    shared = lora_params(handle)
    kept = {path: site.path for path, site in adapter_of(handle).sites.items()}
    bare = build_double(family).requires_grad_(False)
    expected = lora.oracle_logits(bare, IDS, MASK, {kept[p]: e for p, e in shared.items()})
    close(got, expected)
    keep = MASK.bool()
    same_gradients(handle, got[keep].square().sum() / 100, expected[keep].square().sum() / 100)
    assert len(parameters) == len(shared) * (3 if kind == "dora" else 2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_those_of_finite_differences(kind: str):
    """DoRA's norm is a constant for autograd by its own paper, so its A and B are left out there."""
    model, handle, _ = attached("llama", kind, torch.float64)
    leaves = {
        name: p
        for name, p in handle.trainable_parameters().items()
        if "layers/1" in name
        and ("q_proj" in name or "down_proj" in name)
        and (kind != "dora" or name.endswith("magnitude"))
    }
    assert leaves
    finite_differences(lambda: ours(model)[MASK.bool()].square().mean(), leaves)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gain_of_dora_is_that_of_the_dense_weight(family: str):
    model, handle, params = attached(family, "dora", torch.float64)
    handle.detach()
    for path, expert in params.items():
        weight, _ = base_weight(model.get_submodule(path))
        model_rows = loramux.Rows(
            handle_spans(expert), expert.A, expert.B.T.contiguous(), expert.magnitude[None]
        )
        expected = expert.magnitude / dora_norm(weight, expert)
        torch.testing.assert_close(dora_gain(model_rows, weight)[0], expected)


def handle_spans(expert: lora.LowRank) -> Any:
    from loramux.ops.contract import Spans

    return Spans.packed([expert.A.shape[0]], [expert.scale])


def test_dropout_acts_on_the_adapters_input_only_and_keeps_its_mean():
    model = build_double()
    params = random_params(model, 4, scale=1.5)
    one_site = {path: e for path, e in params.items() if path == "model.layers.1.mlp.down_proj"}
    base = model_logits(model, IDS, MASK)
    config = loramux.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, target_modules=tuple(one_site))
    handle = loramux.attach(model, config)
    copy_lora(handle, one_site)
    quiet = ours(model).detach()
    model.train()
    outputs = []
    head = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, out: outputs.append(out.detach())
    )
    for _ in range(150):
        ours(model)
    noisy = torch.stack(outputs)
    model.eval()
    outputs.clear()
    ours(model)
    head.remove()
    deviation = noisy.std(0) / 150**0.5
    error = (noisy.mean(0) - outputs[0]).abs()
    assert noisy.std(0).mean() > 0.1
    assert (error < 5 * deviation + 1e-6).float().mean() > 0.99
    assert (quiet - base).abs().max() > 0.1


def test_rank_and_alpha_patterns_set_rank_and_scale_of_their_sites(pico: nn.Module):
    config = loramux.LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 8},
        alpha_pattern={"v_proj": 1},
    )
    handle = loramux.attach(pico, config)
    rows = adapter_of(handle).rows
    assert rows["model.layers.0.self_attn.q_proj"].spans.rank == (2,)
    assert rows["model.layers.0.self_attn.q_proj"].spans.scale == (3.0,)
    assert rows["model.layers.1.mlp.up_proj"].spans.rank == (8,)
    assert rows["model.layers.0.mlp.up_proj"].spans.rank == (4,)
    assert rows["model.layers.1.self_attn.v_proj"].spans.scale == (0.25,)


def test_rank_80_on_all_seven_projections_of_llama_2_7b_counts_199_884_800():
    """By the rows the method asks for at sites of that shape."""
    from loramux.methods.lora import LoraMethod

    method = LoraMethod(loramux.LoraConfig(r=80, lora_alpha=160))
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(d, f), (d, f), (f, d)]
    sites = [
        loramux.Site(f"l.0.{i}", str(i), 0, "l.0", "l.0", "other", "plain", *shape, d)
        for i, shape in enumerate(shapes)
    ]
    count = sum(e.rank * (site.d_in + site.d_out) for site in sites for e in method.experts(site))
    assert 32 * count == 199_884_800
