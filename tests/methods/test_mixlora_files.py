"""Oracle 9 of MixLoRA's specification: files of the published layouts and our own keep the logits."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loramux
from loramux.core.types import Site
from loramux.formats.mixlora import write_mixlora
from loramux.methods.mixlora import MixLoRAMethod
from loramux.persist.published import mixlora_config, mixlora_tensors
from methods.bridge import (
    adapter_of,
    close,
    copy_mixlora,
)
from methods.mixlora_case import EXPERTS, RANK, REAL, attached, oracle_of, run
from oracles.random_params import mixlora_params as random_params
from pico import build_pico


def published(handle: loramux.Handle, folder: Path, **changes: Any) -> Path:
    adapter = adapter_of(handle)
    config = {**mixlora_config(adapter), **changes}
    write_mixlora(folder, config, mixlora_tensors(adapter, config))
    return folder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
def test_9_the_published_layout_loads_with_the_oracles_logits(
    tmp_path: Path, strategy: str, dora: bool
):
    _, handle, params = attached(dora=dora, routing_strategy=strategy, published_parity=True)
    folder = published(handle, tmp_path / "published")
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    expected, _ = oracle_of("llama", params, False, strategy=strategy, multiply=True)
    close(run(loaded.model).detach()[REAL], expected[REAL].detach())


@pytest.mark.parametrize(
    "settings",
    [
        {"routing_strategy": "mixlora-switch"},
        {"routing_strategy": "mixlora-dynamic", "renormalise_top_p": True},
        {"routing_strategy": "mixlora-dynamic", "temperature": 0.7},
    ],
)
def test_9_a_rule_the_published_layout_cannot_say_is_refused_instead_of_changed(
    tmp_path: Path, settings: dict[str, Any]
):
    _, handle, _ = attached(**settings)
    with pytest.raises(ValueError, match="cannot say"):
        handle.save(tmp_path / "published", layout="mixlora")
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("settings", "ours", "theirs"),
    [
        ({"top_k": 1}, 1e-3, 1e-3),
        ({"top_k": 2}, 2e-3, 1e-3),
        ({"top_k": 3}, 3e-3, 1e-3),
        ({"top_k": 3, "aux_form": "code"}, 1e-3, 1e-3),
        ({"routing_strategy": "mixlora-switch", "published_parity": True}, 1e-3, 1e-3),
        ({"routing_strategy": "mixlora-dynamic"}, 1e-3, 1e-3),
        ({"top_k": 2, "router_aux_loss_coef": 0.5}, 0.5, 0.25),
    ],
)
def test_9_the_written_coefficient_weighs_the_published_loss_as_ours_weighs_our_own(
    settings: dict[str, Any], ours: float, theirs: float
):
    _, handle, _ = attached(**settings)
    config = adapter_of(handle).method.config
    assert isinstance(config, loramux.MixLoRAConfig)
    assert config.router_aux_loss_coef == pytest.approx(ours)
    written = mixlora_config(adapter_of(handle))["router_aux_loss_coef"]
    assert written == pytest.approx(theirs)


def test_targets_without_a_layer_that_holds_experts_are_refused_and_the_model_untouched():
    model = build_pico("llama")
    before = list(model.state_dict())
    config = loramux.MixLoRAConfig(sparse_step=2, layers_to_transform=(1,))
    with pytest.raises(ValueError, match=r"sparse_step=2 .* targeted ones are \[1\]"):
        loramux.attach(model, config)
    assert list(model.state_dict()) == before


def test_9_experts_of_another_rank_than_attention_load_with_the_oracles_logits(tmp_path: Path):
    """`expert_lora` of the published config overrides r and alpha inside the FFN."""
    model = build_pico("llama")
    attention = random_params(model, EXPERTS, RANK, scale=1.5)
    experts = random_params(model, EXPERTS, 2, scale=0.75, seed=3)
    params = attention._replace(experts=experts.experts)
    config = loramux.MixLoRAConfig(
        r=RANK, lora_alpha=1.5 * RANK, num_experts=EXPERTS, lora_dropout=0.0,
        expert_r=2, expert_alpha=1.5,
    )  # fmt: skip
    handle = loramux.attach(model, config, backend="reference")
    copy_mixlora(handle, params)
    folder = published(handle, tmp_path / "published", expert_lora={"r": 2, "lora_alpha": 1.5})
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    expected, _ = oracle_of("llama", params, False)
    close(run(loaded.model).detach()[REAL], expected[REAL].detach())


def test_9_what_expert_lora_says_is_honoured_or_refused_but_never_ignored(tmp_path: Path):
    """alpha / sqrt(r) for the experts alone: another function than the one without it."""
    _, handle, _ = attached()
    folder = published(handle, tmp_path / "published", expert_lora={"use_rslora": True})
    loaded = None
    with contextlib.suppress(ValueError):
        loaded = loramux.load(build_pico("llama"), folder)
    if loaded is None:
        return
    rows = adapter_of(loaded).rows
    assert rows["model.layers.0.mlp.up_proj"].spans.scale[0] == 1.5 * RANK / RANK**0.5
    assert rows["model.layers.0.self_attn.q_proj"].spans.scale[0] == 1.5


def test_9_legacy_keys_load_to_the_same_numbers(tmp_path: Path):
    _, handle, _ = attached()
    folder = published(handle, tmp_path / "published")
    current = loramux.load(build_pico("llama"), folder, backend="reference")
    expected = run(current.model).detach()
    path = folder / "adapter_model.safetensors"
    save_file({_legacy(name): t for name, t in load_file(path).items()}, path)
    config = folder / "adapter_config.json"
    text = config.read_text().replace('"mixlora"', '"mixtral"')
    for new, old in (("gate_proj", "w1_proj"), ("down_proj", "w2_proj"), ("up_proj", "w3_proj")):
        text = text.replace(new, old)
    config.write_text(text)
    legacy = loramux.load(build_pico("llama"), folder, backend="reference")
    assert torch.equal(run(legacy.model).detach(), expected)


def _legacy(name: str) -> str:
    name = name.replace(".mlp.moe_gate.", ".gate.")
    for new, old in (("gate_proj", "w1_proj"), ("down_proj", "w2_proj"), ("up_proj", "w3_proj")):
        if f".mlp.{new}.experts." in name:
            before, after = name.split(f".mlp.{new}.experts.")
            number, rest = after.split(".", 1)
            return f"{before}.experts.{number}.{old}.{rest}"
    return name


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_9_our_own_folder_keeps_the_logits(tmp_path: Path, family: str, dora: bool):
    model, handle, _ = attached(family, dora=dora)
    folder = handle.save(tmp_path / "mixture")
    loaded = loramux.load(build_pico(family), folder, backend="reference")
    assert torch.equal(run(loaded.model), run(model))


def test_9_a_published_folder_of_another_base_is_refused(tmp_path: Path):
    _, handle, _ = attached()
    folder = published(handle, tmp_path / "published")
    for other in ({"hidden_size": 64}, {"num_hidden_layers": 1}, {"intermediate_size": 64}):
        with pytest.raises(ValueError, match="another base|not a linear"):
            loramux.load(build_pico("llama", **other), folder)


def test_9_a_router_of_another_width_is_refused(tmp_path: Path):
    _, handle, _ = attached()
    folder = published(handle, tmp_path / "published")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["mixlora.layers.0.mlp.moe_gate.weight"] = torch.ones(EXPERTS, 16)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="gate"):
        loramux.load(build_pico("llama"), folder)


def test_9_the_parameters_of_llama_2_7b_count_203_423_744():
    method = MixLoRAMethod(loramux.MixLoRAConfig())
    d, f = 4096, 11008
    attention = [(f"self_attn.{i}", d, d, "attention", "plain") for i in range(4)]
    ffn = [
        ("mlp.gate_proj", d, f, "ffn", "enter"),
        ("mlp.up_proj", d, f, "ffn", "enter"),
        ("mlp.down_proj", f, d, "ffn", "exit"),
    ]
    sites = [
        Site(f"l.0.{name}", name, 0, "l.0", f"l.0.{name.split('.')[0]}", kind, role, i, o, d)  # type: ignore[arg-type]
        for name, i, o, kind, role in [*attention, *ffn]
    ]
    rows = sum(e.rank * (s.d_in + s.d_out) for s in sites for e in method.experts(s))
    (router,) = method.routers(sites).values()
    assert 32 * (rows + sum(p.numel() for p in router.parameters())) == 203_423_744
    assert 32 * sum(p.numel() for p in router.parameters()) == 1_048_576


def test_9_loading_a_published_folder_says_what_the_format_does_not_keep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _, handle, _ = attached()
    folder = published(handle, tmp_path / "published")
    config = folder / "adapter_config.json"
    kept = json.loads(config.read_text())
    kept.pop("router_aux_loss_coef")
    config.write_text(json.dumps(kept))
    with caplog.at_level(logging.WARNING):
        loramux.load(build_pico("llama"), folder)
    assert "router_aux_loss_coef" in caplog.text
