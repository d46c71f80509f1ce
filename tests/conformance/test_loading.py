"""Invariant 12: loading is all or nothing: one clear error, and the model is as it was."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loramux
from conformance.cases import (
    Maker,
    Variant,
    every_variant,
    first_variants,
    learning,
    logits_of,
    named,
    trace,
)
from loramux.formats.digest import tensor_digest
from loramux.formats.peft import read_peft
from pico import build_pico

Edit = Callable[[Path], None]
VARIANTS = [pytest.param(v, id=v.name) for v in first_variants()]
MIXED = [v for v in every_variant() if v.method_class.servability != "static"]


@pytest.fixture(scope="module")
def saved(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Path]:
    """Folder of a trained adapter of a variant; written once, copy before you edit."""
    root = tmp_path_factory.mktemp("saved")

    def folder_of(variant: Variant) -> Path:
        folder = root / variant.name
        if not folder.exists():
            make.attach(build_pico("llama"), variant).save(folder)
        return folder

    return folder_of


def parts(folder: Path) -> list[Path]:
    """The PEFT folders inside: the folder itself, or its experts."""
    experts = folder / "experts"
    return sorted(experts.iterdir()) if experts.is_dir() else [folder]


def edit_tensors(change: Callable[[dict[str, Tensor]], None]) -> Edit:
    def edit(folder: Path) -> None:
        for part in parts(folder):
            path = part / "adapter_model.safetensors"
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
        record_digests(folder)

    return edit


def record_digests(folder: Path) -> None:
    """Let the digests agree again, so that the check behind them is the one that speaks."""
    path = folder / "mixture_config.json"
    if not path.exists():
        return
    header = json.loads(path.read_text())
    header["router"] = tensor_digest({}, load_file(folder / "router.safetensors"))
    for entry in header["experts"]:
        with contextlib.suppress(ValueError):  # a folder that cannot be read needs no digest
            entry["digest"] = read_peft(folder / entry["path"], allow_zero=True).digest
    path.write_text(json.dumps(header))


def edit_config(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        for part in parts(folder):
            path = part / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def poison(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def forget_one(tensors: dict[str, Tensor]) -> None:
    tensors.pop(next(name for name in tensors if "lora_A" in name))


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 32)


def zero_b(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def remove_weights(folder: Path) -> None:
    (parts(folder)[0] / "adapter_model.safetensors").unlink()


EDITS: dict[str, Edit] = {
    "a NaN": edit_tensors(poison),
    "a missing tensor": edit_tensors(forget_one),
    "a tensor nobody uses": edit_tensors(add_one),
    "every B zero": edit_tensors(zero_b),
    "an unknown config key": edit_config(secret_scaling=2.0),
    "another rank": edit_config(r=9),
    "a missing file": remove_weights,
}


def refused(model: nn.Module, folder: Path, match: str = ".", **options: Any) -> str:
    before, base = trace(model), logits_of(model)
    with pytest.raises(ValueError, match=match) as caught:
        loramux.load(model, folder, **options)
    assert trace(model) == before
    assert torch.equal(logits_of(model), base)
    return str(caught.value)


@pytest.mark.parametrize("what", list(EDITS))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_damaged_folder_is_refused_and_the_model_untouched(
    saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module, variant: Variant, what: str
):
    folder = tmp_path / "damaged"
    shutil.copytree(saved(variant), folder)
    EDITS[what](folder)
    message = refused(pico, folder)
    assert len(message) > 30
    # The same folder undamaged loads afterwards.
    loramux.load(pico, saved(variant))


WRONG_BASES: dict[str, dict[str, Any]] = {
    "other widths": {"hidden_size": 64},
    "fewer layers": {"num_hidden_layers": 1},
    "other weights": {"seed": 1},
}


@pytest.mark.parametrize("what", list(WRONG_BASES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_another_base_is_refused(saved: Callable[[Variant], Path], variant: Variant, what: str):
    refused(build_pico("llama", **WRONG_BASES[what]), saved(variant))


@pytest.mark.parametrize("what", ["other widths", "fewer layers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_another_base_is_refused_by_its_shapes_even_without_the_digest(
    saved: Callable[[Variant], Path], variant: Variant, what: str
):
    refused(build_pico("llama", **WRONG_BASES[what]), saved(variant), check_base=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_family_is_refused(saved: Callable[[Variant], Path], variant: Variant):
    refused(build_pico("gpt2"), saved(variant), check_base=False)


def test_the_digest_check_can_be_waived_for_the_same_shapes(
    saved: Callable[[Variant], Path],
):
    handle = loramux.load(build_pico("llama", seed=1), saved(MIXED[0]), check_base=False)
    assert logits_of(handle.model).isfinite().all()


def edit_router(change: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "router.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        record_digests(folder)

    return edit


ROUTER_EDITS: dict[str, Edit] = {
    "a missing tensor": edit_router(lambda t: t.pop(next(iter(t)))),
    "a tensor nobody uses": edit_router(lambda t: t.update(extra=torch.ones(2))),
    "another shape": edit_router(lambda t: t.update({next(iter(t)): torch.ones(2, 3)})),
    "a NaN": edit_router(poison),
    "no router": lambda folder: (folder / "router.safetensors").unlink(),
}


@pytest.mark.parametrize("what", list(ROUTER_EDITS))
@pytest.mark.parametrize(
    "variant", [v for v in learning(first_variants()) if v in MIXED], ids=named
)
def test_a_damaged_router_is_refused(
    saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module, variant: Variant, what: str
):
    folder = tmp_path / "damaged"
    shutil.copytree(saved(variant), folder)
    ROUTER_EDITS[what](folder)
    refused(pico, folder)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "mixture_config.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


@pytest.mark.parametrize("variant", MIXED, ids=lambda v: v.name)
def test_an_unknown_setting_of_the_method_is_refused_with_a_suggestion(
    saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module, variant: Variant
):
    folder = tmp_path / "edited"
    shutil.copytree(saved(variant), folder)
    edit_header(folder, lambda header: header["config"].update(lora_alpa=3))
    assert "lora_alpha" in refused(pico, folder, match="lora_alpa")


@pytest.mark.parametrize("variant", MIXED, ids=lambda v: v.name)
def test_experts_in_another_order_than_their_router_was_trained_with_are_refused(
    saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module, variant: Variant
):
    folder = tmp_path / "edited"
    shutil.copytree(saved(variant), folder)
    before = json.loads((folder / "mixture_config.json").read_text())["experts"]
    if len(before) < 2:
        pytest.skip("a single folder has no order")
    edit_header(folder, lambda header: header["experts"].reverse())
    refused(pico, folder)


@pytest.mark.parametrize("variant", MIXED, ids=lambda v: v.name)
def test_an_expert_that_is_not_listed_or_not_there_is_refused(
    saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module, variant: Variant
):
    for number, edit in enumerate((shutil.rmtree, lambda p: shutil.copytree(p, f"{p}x"))):
        folder = tmp_path / str(number)
        shutil.copytree(saved(variant), folder)
        edit(parts(folder)[-1])
        refused(pico, folder)


# -- resuming and naming -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_adapter_loads_only_to_go_on_training(
    make: Maker, tmp_path: Path, pico: nn.Module, variant: Variant
):
    if variant.method_class.needs_adapters:
        pytest.skip("its experts are trained")
    handle = make.attach(pico, variant, trained=False)
    folder = handle.save(tmp_path / "fresh")
    handle.detach()
    refused(pico, folder, match="changes nothing")
    resumed = loramux.load(pico, folder, trainable=True)
    assert resumed.trainable_parameters()


@pytest.mark.parametrize("variant", every_variant(), ids=lambda v: v.name)
def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(
    make: Maker, tmp_path: Path, pico: nn.Module, variant: Variant
):
    handle = make.attach(pico, variant)
    # Row gates are folded into what is saved.
    names = [name for name in handle.trainable_parameters() if ".gate." not in name]
    folder = handle.save(tmp_path / "adapter")
    handle.detach()
    frozen = loramux.load(pico, folder)
    assert not frozen.trainable_parameters()
    assert not any(p.requires_grad for p in pico.parameters())
    frozen.detach()
    assert list(loramux.load(pico, folder, trainable=True).trainable_parameters()) == names


def test_a_pickled_folder_is_refused_with_a_way_to_convert_it(
    saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module
):
    folder = tmp_path / "pickled"
    shutil.copytree(saved(first_variants()[0]), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "convert" in refused(pico, folder, match="pickle")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, pico: nn.Module):
    refused(pico, tmp_path / "nothing", match="not a folder")


def test_a_second_adapter_that_fails_to_load_leaves_the_first(
    make: Maker, saved: Callable[[Variant], Path], tmp_path: Path, pico: nn.Module
):
    lora, *others = first_variants()
    handle = make.attach(pico, lora)
    expected, before = logits_of(pico), trace(pico)
    folder = tmp_path / "damaged"
    shutil.copytree(saved(others[0]), folder)
    EDITS["a NaN"](folder)
    with pytest.raises(ValueError, match="NaN|changed after"):
        handle.load(folder, name="second")
    with pytest.raises(ValueError, match="default"):
        handle.load(saved(others[0]), name="default")
    with pytest.raises(ValueError, match="q_porj"):
        handle.add(loramux.LoraConfig(target_modules=["q_porj"]), name="third")
    assert trace(pico) == before
    assert list(handle.adapters) == ["default"]
    assert torch.equal(logits_of(pico), expected)
