"""The probe finds what a model's attention is like, and says why a model cannot be served."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from loramux.engine.kv import KVShape
from loramux.engine.probe import UnservableModelError, probe_model
from pico import _SIZES, FAMILIES, build_pico


def build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_scale_of_every_family_are_found(family: str) -> None:
    model = build_pico(family)
    shape = probe_model(model)
    heads = 4 if family == "gpt2" else 2
    assert shape.kv == [KVShape(heads, 8, 8)] * 2
    assert [layer.num_heads for layer in shape.layers] == [4, 4]
    assert [layer.scale for layer in shape.layers] == pytest.approx([8**-0.5] * 2)
    for layer in shape.layers:
        assert model.get_submodule(layer.path) is layer.module


def test_windows_are_found_per_layer() -> None:
    windows = {
        family: [layer.window for layer in probe_model(build_pico(family, **extra)).layers]
        for family, extra in {
            "gemma3": {}, "llama": {}, "mistral": {"sliding_window": 7}, "phi3": {"sliding_window": 300},
        }.items()
    }  # fmt: skip
    assert windows == {
        "gemma3": [16, None], "llama": [None, None], "mistral": [7, 7], "phi3": [300, 300],
    }  # fmt: skip


def test_linears_that_read_one_tensor_are_a_group() -> None:
    groups = probe_model(build_pico("llama")).groups
    layer = "model.layers.0."
    assert groups[:4] == (
        (layer + "self_attn.q_proj", layer + "self_attn.k_proj", layer + "self_attn.v_proj"),
        (layer + "self_attn.o_proj",),
        (layer + "mlp.gate_proj", layer + "mlp.up_proj"),
        (layer + "mlp.down_proj",),
    )
    assert len(groups) == 8


def test_fused_linears_are_groups_of_one() -> None:
    groups = probe_model(build_pico("gpt2")).groups
    assert [len(group) for group in groups] == [1] * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probed_model_is_what_it_was(family: str) -> None:
    model = build_pico(family).train()
    before = model.config.to_dict(), model.config._attn_implementation
    probe_model(model)
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4), "0 of 2 layers"),
        (BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "does not take what the engine"),
        (
            GptOssConfig(**_SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4),
            "s_aux",
        ),
        (
            Llama4TextConfig(
                **_SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
                attention_chunk_size=16, attn_temperature_tuning=False,
            ),
            "neither causal nor causal within a sliding window",
        ),
    ],
    ids=["state space", "own attention", "sinks", "chunks"],
)  # fmt: skip
def test_what_the_engine_cannot_serve_is_refused_by_name(
    config: PreTrainedConfig, why: str
) -> None:
    with pytest.raises(UnservableModelError, match=why):
        probe_model(build(config))


def test_encoder_decoder_models_are_refused() -> None:
    config = T5Config(
        vocab_size=96,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(UnservableModelError, match="not a decoder-only"):
        probe_model(T5ForConditionalGeneration(config))


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnservableModelError, match="Linear is not a decoder-only"):
        probe_model(nn.Linear(4, 4))


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(UnservableModelError, match="neither causal"):
        probe_model(build_pico("gemma3", use_bidirectional_attention=True))


def test_a_state_beside_keys_and_values_is_noticed() -> None:
    """A convolution over tokens: whole prompts give what they should, pieces do not."""

    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
            return self.inner(x + before)

    model = build_pico("llama")
    model.model.layers[1].mlp = Shifted(model.model.layers[1].mlp)
    with pytest.raises(UnservableModelError, match="keeps a state of another kind"):
        probe_model(model)


def test_a_family_that_hands_no_keywords_on_is_served() -> None:
    config = StableLmConfig(**_SIZES)
    assert len(probe_model(build(config)).layers) == 2


def test_a_layer_that_runs_twice_is_refused() -> None:
    model = build_pico("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnservableModelError, match="runs twice"):
        probe_model(model)


def test_a_failed_probe_leaves_the_model_as_it_was() -> None:
    model = build_pico("llama")
    model.model.layers[1] = model.model.layers[0]
    before = model.config._attn_implementation
    with pytest.raises(UnservableModelError):
        probe_model(model)
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_modules_keep_their_own_mode(mode: bool) -> None:
    model = build_pico("llama").train(mode)
    model.model.layers[0].mlp.train(not mode)
    before = [module.training for module in model.modules()]
    probe_model(model)
    assert [module.training for module in model.modules()] == before
