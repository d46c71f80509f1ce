"""Files of PEFT load here and files of ours load in PEFT, with the same bits, scales and logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from formats.samples import adapter, same_tensors, snapshot
from loramux.formats.peft import read_peft, write_peft
from loramux.formats.scaling import (
    peft_config,
    rank_and_scale,
    site_scaling,
    target_names,
    uneven,
)
from loramux.formats.tensors import AdapterTensors, SiteTensors, named_tensors
from pico import build_pico

LINEARS = ["q_proj", "v_proj", "down_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": LINEARS}),
    "all linears": ("llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": LINEARS, "use_dora": True}),
    "rslora": ("llama", {"target_modules": LINEARS, "use_rslora": True}),
    "rank_pattern": (
        "llama",
        {"target_modules": LINEARS, "rank_pattern": {r"layers\.0\..*q_proj": 2, "v_proj": 6}},
    ),
    "alpha_pattern": (
        "llama",
        {
            "target_modules": LINEARS,
            "rank_pattern": {"^model.layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"mlp.down_proj": 5, "self_attn.q_proj": 7.5},
            "use_rslora": True,
        },
    ),
    "one layer": ("llama", {"target_modules": LINEARS, "layers_to_transform": [1]}),
    "regex targets": ("llama", {"target_modules": r".*layers\.0\.(mlp|self_attn)\.(q|up)_proj"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d dora": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
        if "lora_magnitude_vector" in name:
            parameter.mul_(1.0 + 0.2 * torch.rand_like(parameter))


@pytest.fixture(params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, PeftModel, Path]:
    family, fields = VARIANTS[request.param]
    model = get_peft_model(build_pico(family), LoraConfig(r=4, lora_alpha=8, **fields))
    _randomise(model)
    model.save_pretrained(tmp_path / "theirs")
    return family, model.eval(), tmp_path / "theirs"


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 24).view(2, 10)).logits


def test_every_tensor_of_a_peft_folder_is_read_bit_for_bit(saved):
    _, _, folder = saved
    mine = {f"base_model.model.{n}": t for n, t in named_tensors(read_peft(folder).sites).items()}
    assert same_tensors(mine, load_file(folder / "adapter_model.safetensors"))


def test_rank_and_scale_are_those_of_the_peft_layer(saved):
    _, model, folder = saved
    found = read_peft(folder)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert found.sites.keys() == layers.keys()
    scaling = site_scaling(found.config, {path: s.rank for path, s in found.sites.items()})
    for path, layer in layers.items():
        theirs = (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"])
        assert scaling[path] == theirs
        assert rank_and_scale(found.config, path, found.sites[path].rank) == theirs


def test_reading_then_writing_gives_the_same_weight_file_byte_for_byte(saved, tmp_path):
    _, _, folder = saved
    write_peft(tmp_path / "ours", read_peft(folder))
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes()
    again = read_peft(tmp_path / "ours")
    assert again.digest == read_peft(folder).digest
    assert again.config == json.loads((folder / "adapter_config.json").read_text())


def test_a_rewritten_folder_gives_peft_the_same_logits(saved, tmp_path):
    family, model, folder = saved
    write_peft(tmp_path / "ours", read_peft(folder))
    loaded = PeftModel.from_pretrained(build_pico(family), tmp_path / "ours").eval()
    assert torch.equal(_logits(loaded), _logits(model))


def test_an_adapter_of_ours_with_uneven_ranks_loads_in_peft_with_our_scales(tmp_path):
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 5}
    ranks["model.layers.1.mlp.up_proj"] = 2
    alphas = dict.fromkeys(ranks, 3.0) | {"model.layers.1.mlp.up_proj": 4.5}
    base = build_pico("llama")
    linears = {name: base.get_submodule(name) for name in ranks}
    others = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n not in ranks]
    r, alpha, rank_pattern, alpha_pattern = uneven(ranks, alphas)
    targets = target_names(ranks, others)
    assert targets == ["model.layers.1.mlp.up_proj", "q_proj"]
    config = peft_config(
        r, alpha, target_modules=targets, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    sites = {
        path: SiteTensors(
            torch.randn(ranks[path], linear.in_features),
            torch.randn(ranks[path], linear.out_features),
        )
        for path, linear in linears.items()
    }
    write_peft(tmp_path / "a", AdapterTensors.build(config, sites))
    model = PeftModel.from_pretrained(base, tmp_path / "a")
    for path, site in sites.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        assert torch.equal(layer.lora_A["default"].weight, site.a)
        assert torch.equal(layer.lora_B["default"].weight, site.b.t())
        assert layer.scaling["default"] == alphas[path] / ranks[path]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_file_is_kept(tmp_path, dtype):
    given = adapter(dtype=dtype, dora=True)
    write_peft(tmp_path / "a", given)
    found = read_peft(tmp_path / "a")
    assert same_tensors(named_tensors(found.sites), named_tensors(given.sites))
    assert found.digest == given.digest


def test_sites_come_in_natural_order_whatever_the_order_of_the_file(tmp_path):
    site = adapter().sites["model.layers.0.self_attn.q_proj"]
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in (10, 2, 0)]
    write_peft(tmp_path, AdapterTensors.build(adapter().config, dict.fromkeys(paths, site)))
    assert list(read_peft(tmp_path).sites) == paths[::-1]


def test_magnitudes_under_the_older_key_are_the_same_adapter(tmp_path):
    from formats.samples import edit_tensors

    given = adapter(dora=True)
    write_peft(tmp_path, given)

    def rename(tensors):
        for name in [n for n in tensors if n.endswith("vector")]:
            tensors[f"{name}.weight"] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    assert read_peft(tmp_path).digest == given.digest


def test_writing_again_replaces_both_files_and_leaves_no_scraps(tmp_path):
    write_peft(tmp_path, adapter(seed=1))
    (tmp_path / "README.md").write_text("mine")
    write_peft(tmp_path, adapter(seed=2))
    assert read_peft(tmp_path).digest == adapter(seed=2).digest
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(snapshot(tmp_path)) == names
