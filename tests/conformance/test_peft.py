"""Invariant 11: static adapters are PEFT folders in both directions; of a mixture each expert alone is one."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import loramux
from conformance.cases import (
    Maker,
    Variant,
    crossed,
    every_variant,
    logits_of,
    named,
    variants_of,
)
from loramux.core.bank import Rows
from loramux.ops.contract import Spans
from pico import FAMILIES, build_pico

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FILES = ["adapter_config.json", "adapter_model.safetensors"]
STATIC = [v for v in every_variant() if v.method_class.servability == "static"]
MIXED = [v for v in every_variant() if v.method_class.servability != "static"]
MIXED_FAMILIES = [case for case in crossed("phi3", "gpt2") if case[0] in MIXED]


def in_peft(folder: Path | str, family: str = "llama") -> nn.Module:
    return peft.PeftModel.from_pretrained(build_pico(family), str(folder)).eval()


def no_peft_warnings(model: nn.Module, folder: Path) -> None:
    """PEFT only warns about tensors it misses or does not know; ask it directly."""
    state = peft.load_peft_weights(str(folder))
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", STATIC, ids=lambda v: v.name)
def test_a_static_adapter_loads_in_peft_with_equal_logits(
    make: Maker, tmp_path: Path, variant: Variant, family: str
):
    model = build_pico(family)
    handle = make.attach(model, variant, family)
    expected = logits_of(model)
    folder = handle.save(tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [*FILES, "loramux.json"]
    other = in_peft(folder, family)
    no_peft_warnings(other, folder)
    torch.testing.assert_close(logits_of(other), expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("variant", STATIC, ids=lambda v: v.name)
def test_an_adapter_survives_saving_and_loading_bit_by_bit(
    make: Maker, tmp_path: Path, variant: Variant, family: str
):
    model = build_pico(family)
    handle = make.attach(model, variant, family)
    expected = logits_of(model)
    first = handle.save(tmp_path / "first")
    handle.detach()
    loaded = loramux.load(model, first, backend="reference")
    assert torch.equal(logits_of(model), expected)
    second = loaded.save(tmp_path / "second")
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"{second}": 2},
        "alpha_pattern": {"{second}": 9},
        "layers_to_transform": [1],
    },
}
TARGETS = {
    "llama": ["q_proj", "o_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "c_fc", "attn.c_proj"],
}


def trained_in_peft(family: str, settings: dict[str, Any]) -> nn.Module:
    """A PEFT model after a few of its own steps, B and magnitudes off their start."""
    second = TARGETS[family][1]
    filled = {
        key: {k.format(second=second): v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in settings.items()
    }
    config = peft.LoraConfig(
        target_modules=TARGETS[family],
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
        **filled,
    )
    model = peft.get_peft_model(build_pico(family), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    ids = torch.randint(4, 96, (2, 9))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("family", list(TARGETS))
@pytest.mark.parametrize("kind", list(PEFT_CONFIGS))
def test_an_adapter_trained_in_peft_loads_with_equal_logits_and_is_written_back_bit_by_bit(
    tmp_path: Path, kind: str, family: str
):
    theirs = trained_in_peft(family, PEFT_CONFIGS[kind])
    expected = logits_of(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = build_pico(family)
    assert (expected - logits_of(model)).abs().max() > 0.05
    handle = loramux.load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    ours = handle.save(tmp_path / "ours")
    weights = "adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    configs = [json.loads((f / FILES[0]).read_text()) for f in (ours, tmp_path / "theirs")]
    assert configs[0] == configs[1]
    torch.testing.assert_close(logits_of(in_peft(ours, family)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_stay_in_half_precision(tmp_path: Path, dtype: torch.dtype):
    theirs = trained_in_peft("llama", PEFT_CONFIGS["lora"])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = build_pico("llama")
    handle = loramux.load(model, tmp_path / "theirs")
    ours = handle.save(tmp_path / "ours")
    weights = "adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()


# -- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "family"), MIXED_FAMILIES, ids=named)
def test_a_mixture_survives_saving_and_loading_bit_by_bit(
    make: Maker, tmp_path: Path, variant: Variant, family: str
):
    model = build_pico(family)
    handle = make.attach(model, variant, family)
    expected = logits_of(model)
    first = handle.save(tmp_path / "first")
    config = handle.adapters["default"].method.config.to_dict()
    handle.detach()
    loaded = loramux.load(model, first, backend="reference")
    assert torch.equal(logits_of(model), expected)
    again = loaded.adapters["default"].method.config.to_dict()
    # Frozen adapters are inside now, under their names; where they came from means nothing elsewhere.
    assert {**again, "adapters": None} == {**config, "adapters": None}
    second = loaded.save(tmp_path / "second")
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def rows_of_expert(handle: loramux.Handle, folder: Path) -> dict[str, tuple[Rows, int]]:
    """Site -> (rows, slot) that an expert's folder was written from."""
    adapter = handle.adapters["default"]
    found = {}
    for path, own in adapter.rows.items():
        rows = own.folded()
        if folder.name == "ranks":
            spans = Spans.packed([rows.spans.num_rows], rows.spans.scale[:1])
            rows, slot = Rows(spans, rows.a.data, rows.b.data), 0
        elif adapter.experts:
            slot = adapter.experts.index(folder.name)
        elif folder.name in ("lora", "shared"):
            slot = 0 if rows.spans.num_slots == 1 else -1
        else:
            slot = int(folder.name.split("_")[1]) if rows.spans.num_slots > 1 else -1
        if 0 <= slot < rows.spans.num_slots and rows.spans.rank[slot]:
            found[path] = (rows, slot)
    return found


def alone(model: nn.Module, slots: dict[str, tuple[Rows, int]]) -> Tensor:
    """Logits with these slots merged into the base weights: what one expert alone computes, without any adapter."""
    for path, (rows, slot) in slots.items():
        module = model.get_submodule(path)
        transposed = not isinstance(module, nn.Linear)
        weight = module.weight.data.T if transposed else module.weight.data
        at = rows.slot_rows(slot)
        merged = weight + rows.spans.scale[slot] * (rows.b[at].T @ rows.a[at]).detach()
        if rows.magnitude is not None:
            merged *= (rows.magnitude[slot] / merged.norm(dim=1))[:, None].detach()
        module.weight.data = (merged.T if transposed else merged).contiguous()
    return logits_of(model)


@pytest.mark.parametrize(("variant", "family"), MIXED_FAMILIES, ids=named)
def test_each_expert_of_a_mixture_alone_is_a_plain_peft_adapter(
    make: Maker, tmp_path: Path, variant: Variant, family: str
):
    handle = make.attach(build_pico(family), variant, family)
    folder = handle.save(tmp_path / "mixture")
    experts = sorted((folder / "experts").iterdir())
    assert experts
    for expert in experts[:3]:
        slots = rows_of_expert(handle, expert)
        theirs = in_peft(expert, family)
        no_peft_warnings(theirs, expert)
        expected = alone(build_pico(family), slots)
        torch.testing.assert_close(logits_of(theirs), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("variant", MIXED, ids=lambda v: v.name)
def test_peft_refuses_the_folder_of_a_mixture(make: Maker, tmp_path: Path, variant: Variant):
    folder = make.attach(build_pico("llama"), variant).save(tmp_path / "mixture")
    with pytest.raises(ValueError, match="adapter_config"):
        in_peft(folder)


def test_save_pretrained_of_the_model_saves_the_active_adapter(make: Maker, tmp_path: Path):
    model = build_pico("llama")
    make.attach(model, variants_of("lora")[0])
    model.save_pretrained(str(tmp_path / "saved"))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [*FILES, "loramux.json"]
    torch.testing.assert_close(logits_of(in_peft(tmp_path / "saved")), logits_of(model), **CLOSE)
