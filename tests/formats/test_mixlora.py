"""Published MixLoRA files, current and legacy, give the same tensors; what is written is the current layout."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.samples import edit_config, edit_tensors, rows, same_tensors
from loramux.formats import FormatError
from loramux.formats.mixlora import read_mixlora, write_mixlora
from loramux.formats.mixlora_config import expert_setting
from loramux.formats.mixlora_tensors import MixLoraTensors
from loramux.formats.tensors import SiteTensors

LAYERS, EXPERTS, WIDTH, INNER, RANK = 2, 3, 6, 10, 2
FFN = {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
LEGACY = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
EXPORTED = {  # what the published writer says, and no more
    "bias": "none",
    "peft_type": "MIXLORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "./llama-7b",
    "r": RANK,
    "lora_alpha": 4,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "gate_proj", "down_proj", "up_proj"],
    "routing_strategy": "mixlora",
    "num_experts": EXPERTS,
    "act_fn": "silu",
    "top_k": 2,
}


def published(legacy: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        root = f"mixlora.layers.{layer}"
        generator = torch.Generator().manual_seed(layer)
        gate = torch.randn(EXPERTS, WIDTH, generator=generator)
        tensors[f"{root}.gate.weight" if legacy else f"{root}.mlp.moe_gate.weight"] = gate
        parts = {f"{root}.self_attn.q_proj": rows(RANK, WIDTH, 8, seed=layer)}
        for index, (name, widths) in enumerate(FFN.items()):
            for e in range(EXPERTS):
                new, old = f"mlp.{name}.experts.{e}", f"experts.{e}.{LEGACY[name]}"
                seed = 100 * layer + 10 * index + e + 5
                parts[f"{root}.{old if legacy else new}"] = rows(RANK, *widths, seed=seed)
        for name, site in parts.items():
            tensors[f"{name}.lora_A.weight"] = site.a
            tensors[f"{name}.lora_B.weight"] = site.b.t().contiguous()
    return tensors


def save(folder: Path, legacy: bool = False, stem: str = "adapter", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = EXPORTED | changes
    if legacy:
        names = [LEGACY.get(name, name) for name in EXPORTED["target_modules"]]  # type: ignore[attr-defined]
        config |= {"routing_strategy": "mixtral", "target_modules": names} | changes
    (folder / f"{stem}_config.json").write_text(json.dumps(config))
    save_file(published(legacy), folder / f"{stem}_model.safetensors")
    return folder


def test_the_current_layout_is_read_by_module_path(tmp_path):
    config, found = read_mixlora(save(tmp_path))
    assert list(found.attention) == [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    assert list(found.ffn)[:3] == [f"model.layers.0.mlp.{n}" for n in sorted(FFN)]
    assert {path: len(e) for path, e in found.ffn.items()} == dict.fromkeys(found.ffn, EXPERTS)
    raw = published()
    site = found.ffn["model.layers.1.mlp.down_proj"][2]
    assert torch.equal(site.a, raw["mixlora.layers.1.mlp.down_proj.experts.2.lora_A.weight"])
    assert torch.equal(site.b.t(), raw["mixlora.layers.1.mlp.down_proj.experts.2.lora_B.weight"])
    assert torch.equal(found.gates[1], raw["mixlora.layers.1.mlp.moe_gate.weight"])
    assert (config["routing_strategy"], config["top_k"], config["act_fn"]) == ("mixlora", 2, "silu")


def test_legacy_and_current_files_are_the_same_adapter(tmp_path):
    config, current = read_mixlora(save(tmp_path / "new"))
    for stem in ("adapter", "mixlora"):
        old_config, old = read_mixlora(save(tmp_path / f"old-{stem}", legacy=True, stem=stem))
        assert old_config == config
        assert old.digest == current.digest
        for path, experts in current.ffn.items():
            pairs = list(zip(experts, old.ffn[path], strict=True))
            assert all(torch.equal(x.a, y.a) and torch.equal(x.b, y.b) for x, y in pairs)
        assert all(torch.equal(gate, old.gates[layer]) for layer, gate in current.gates.items())


def test_legacy_files_are_written_back_in_the_current_layout(tmp_path):
    config, found = read_mixlora(save(tmp_path / "old", legacy=True))
    write_mixlora(tmp_path / "new", config, found)
    assert same_tensors(load_file(tmp_path / "new" / "adapter_model.safetensors"), published())
    again_config, again = read_mixlora(tmp_path / "new")
    assert again_config == config
    assert again.digest == found.digest


def test_a_prefix_places_the_layers_elsewhere(tmp_path):
    config, found = read_mixlora(save(tmp_path / "a"), prefix="language_model.layers")
    assert next(iter(found.attention)) == "language_model.layers.0.self_attn.q_proj"
    write_mixlora(tmp_path / "b", config, found, prefix="language_model.layers")
    assert same_tensors(load_file(tmp_path / "b" / "adapter_model.safetensors"), published())
    with pytest.raises(FormatError, match="no place for"):
        write_mixlora(tmp_path / "c", config, found)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("strategy", "said", "expected"),
    [
        ("mixlora", {}, {"top_k": 2, "router_init_range": 0.02, "jitter_noise": 0.0}),
        ("mixlora-dynamic", {}, {"top_p": 0.8, "temperature": 0.0, "router_init_range": 0.02}),
        ("mixlora-dynamic", {"top_p": 0.5, "temperature": 2}, {"top_p": 0.5, "temperature": 2}),
        (
            "mixlora-switch",
            {"expert_capacity": 16, "sparse_step": 1},
            {
                "expert_capacity": 16,
                "router_init_range": 1.0,
                "jitter_noise": 0.01,
                "ffn_dropout": 0.0,
            },
        ),
    ],
)
def test_defaults_of_each_strategy_are_the_published_ones(tmp_path, strategy, said, expected):
    config, _ = read_mixlora(save(tmp_path, routing_strategy=strategy, **said))
    assert config["routing_strategy"] == strategy
    assert (
        config.items() >= (expected | {"router_aux_loss_coef": 0.001, "router_loss": True}).items()
    )


def test_what_published_files_leave_out_is_warned_about_and_ours_leaves_out_nothing(
    tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        config, found = read_mixlora(save(tmp_path / "theirs"))
    assert all(
        name in caplog.text
        for name in ("router_aux_loss_coef", "jitter_noise", "router_init_range")
    )
    assert "resumed faithfully" in caplog.text
    caplog.clear()
    write_mixlora(tmp_path / "ours", config | {"router_aux_loss_coef": 0.01}, found)
    with caplog.at_level(logging.WARNING):
        again, _ = read_mixlora(tmp_path / "ours")
    assert again["router_aux_loss_coef"] == 0.01
    assert not caplog.text


def test_a_setting_of_another_strategy_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_mixlora(save(tmp_path, top_p=0.7))
    assert "'top_p' has no effect" in caplog.text


def test_null_is_not_said_and_settings_of_other_strategies_are_dropped_on_writing(tmp_path, caplog):
    config, found = read_mixlora(save(tmp_path / "theirs"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        write_mixlora(tmp_path / "ours", config | {"top_p": 0.8, "expert_capacity": None}, found)
        again, _ = read_mixlora(tmp_path / "ours")
    assert again == config
    assert not caplog.text


def test_target_modules_may_map_names_to_booleans(tmp_path):
    names = {"q_proj": True, "k_proj": False, "gate_proj": True, "down_proj": True, "up_proj": True}
    config, _ = read_mixlora(save(tmp_path, target_modules=names))
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]


def test_expert_lora_overrides_rank_and_alpha_of_the_experts_only(tmp_path):
    save(
        tmp_path,
        expert_lora={"r": RANK, "lora_alpha": 32, "bias": "none", "task_type": "CAUSAL_LM"},
        r=3,
    )

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "self_attn" in n]:
            tensors[name] = torch.ones(3, WIDTH) if "lora_A" in name else torch.ones(8, 3)

    edit_tensors(tmp_path, widen)
    config, found = read_mixlora(tmp_path)
    assert expert_setting(config, "lora_alpha") == 32
    assert expert_setting(config, "lora_dropout") == 0.05
    assert found.attention["model.layers.0.self_attn.q_proj"].rank == 3


def test_dora_magnitudes_survive_and_their_loss_is_refused(tmp_path):
    config, plain = read_mixlora(save(tmp_path / "plain"))

    def with_magnitude(site: SiteTensors) -> SiteTensors:
        return SiteTensors(site.a, site.b, torch.rand(site.d_out) + 0.5)

    config |= {"use_dora": True}
    attention = {path: with_magnitude(site) for path, site in plain.attention.items()}
    ffn = {path: [with_magnitude(site) for site in found] for path, found in plain.ffn.items()}
    dora = MixLoraTensors.build(config, attention, ffn, plain.gates)
    write_mixlora(tmp_path / "dora", config, dora)
    _, again = read_mixlora(tmp_path / "dora")
    assert again.digest == dora.digest
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(again.ffn[path][1].magnitude, ffn[path][1].magnitude)
    edit_tensors(tmp_path / "dora", lambda t: [t.pop(n) for n in list(t) if "magnitude" in n])
    with pytest.raises(FormatError, match="does not save DoRA magnitudes"):
        read_mixlora(tmp_path / "dora")


ROOT = "mixlora.layers.1"
TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no gate": (lambda t: t.pop(f"{ROOT}.mlp.moe_gate.weight"), "missing_tensor"),
    "narrow gate": (lambda t: t.update({f"{ROOT}.mlp.moe_gate.weight": torch.ones(2, 6)}), "shape"),
    "an expert less": (
        lambda t: [t.pop(n) for n in list(t) if "up_proj.experts.1." in n], "missing_tensor"
    ),
    "an expert more": (
        lambda t: t.update({n.replace("experts.1.", "experts.9."): v.clone() for n, v in t.items()}),
        "missing_tensor",
    ),
    "half an expert": (
        lambda t: t.pop(f"{ROOT}.mlp.up_proj.experts.1.lora_B.weight"), "missing_tensor"
    ),
    "a layer's attention": (
        lambda t: [t.pop(n) for n in list(t) if f"{ROOT}.self_attn" in n], "missing_tensor"
    ),
    "one linear of a layer": (
        lambda t: [t.pop(n) for n in list(t) if f"{ROOT}.mlp.up_proj" in n], "missing_tensor"
    ),
    "classifier": (lambda t: t.update(classifier=torch.ones(2, 6)), "unexpected_tensor"),
    "gate in both layouts": (
        lambda t: t.update({f"{ROOT}.gate.weight": torch.ones(3, 6)}), "unexpected_tensor"
    ),
    "not a target": (
        lambda t: t.update({n.replace("q_proj", "k_proj"): v.clone() for n, v in t.items()}),
        "unexpected_tensor",
    ),
    "another rank": (
        lambda t: t.update(
            {n: (torch.ones(4, 6) if "lora_A" in n else torch.ones(8, 4)) for n in t if "self_attn" in n}
        ),
        "rank",
    ),
    "NaN": (lambda t: t[f"{ROOT}.mlp.moe_gate.weight"].fill_(torch.nan), "nonfinite"),
    "every B zero": (lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n], "no_op"),
}  # fmt: skip

CONFIG_EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "plain LoRA": ({"peft_type": "LORA"}, "peft_type"),
    "unknown strategy": ({"routing_strategy": "loramoe"}, "bad_value"),
    "unknown key": ({"num_expert": 3}, "unknown_key"),
    "more chosen than there are": ({"top_k": 4}, "bad_value"),
    "no experts": ({"num_experts": 0}, "bad_value"),
    "too few experts": ({"num_experts": 2}, "missing_tensor"),
    "missing rank": ({"r": None}, "bad_value"),
    "biases": ({"bias": "all"}, "unsupported"),
    "target without tensors": ({"target_modules": ["q_proj", "o_proj", *FFN]}, "missing_tensor"),
    "expert_lora of text": ({"expert_lora": "r=4"}, "bad_value"),
    "unknown key of expert_lora": ({"expert_lora": {"rank": 4}}, "unknown_key"),
    "huge number": ({"jitter_noise": 10**400}, "bad_value"),
}


@pytest.mark.parametrize("case", TENSOR_EDITS)
def test_incomplete_or_surplus_tensors_are_refused(tmp_path, case):
    edit, code = TENSOR_EDITS[case]
    edit_tensors(save(tmp_path), edit)
    with pytest.raises(FormatError) as caught:
        read_mixlora(tmp_path)
    assert caught.value.code == code, str(caught.value)


@pytest.mark.parametrize("case", CONFIG_EDITS)
def test_configs_that_cannot_be_meant_are_refused(tmp_path, case):
    changes, code = CONFIG_EDITS[case]
    edit_config(save(tmp_path), **changes)
    with pytest.raises(FormatError) as caught:
        read_mixlora(tmp_path)
    assert caught.value.code == code, str(caught.value)


@pytest.mark.parametrize("stem", ["adapter", "mixlora"])
def test_a_pickled_file_is_refused_with_its_conversion(tmp_path, stem):
    save(tmp_path, stem=stem)
    (tmp_path / f"{stem}_model.safetensors").rename(tmp_path / f"{stem}_model.bin")
    with pytest.raises(FormatError, match="weights_only=True") as caught:
        read_mixlora(tmp_path)
    assert caught.value.code == "pickle"


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"adapter_config\.json is missing"):
        read_mixlora(tmp_path)
