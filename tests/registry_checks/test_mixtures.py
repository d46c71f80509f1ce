"""Mixtures: every part is bound to the others, and settings are judged before anything is built from them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loramux
from conformance.cases import Maker, Variant, variants_of
from loramux.formats.digest import tensor_digest
from loramux.formats.errors import FormatError
from loramux.formats.peft import read_peft
from loramux.registry.checks import (
    BaseShape,
    UploadError,
    UploadLimits,
    base_shape,
    check_upload,
    from_folder,
)
from loramux.registry.checks.mixtures import mixture_digest
from pico import build_pico

Edit = Callable[[Path], None]
HEADER = "mixture_config.json"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseShape:
    return base_shape(base_folder)


def model_of(folder: Path) -> nn.Module:
    model = build_pico("llama")
    model.name_or_path = str(folder)
    return model


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    make = Maker(tmp_path_factory.mktemp("experts"))
    root = tmp_path_factory.mktemp("saved")

    def save(variant: Variant) -> Path:
        make.attach(model_of(base_folder), variant).save(root / variant.name)
        return root / variant.name

    wanted = [*variants_of("molora")[:1], *variants_of("mole")[:1], *variants_of("smora")[:1]]
    return {variant.method: save(variant) for variant in wanted}


def header_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / HEADER).read_text())
    return found


def edit(**changes: Any) -> Edit:
    def change(folder: Path) -> None:
        (folder / HEADER).write_text(json.dumps(header_of(folder) | changes))

    return change


def setting(**changes: Any) -> Edit:
    def change(folder: Path) -> None:
        header = header_of(folder)
        edit(config=header["config"] | changes)(folder)

    return change


def router(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Change router tensors, and let the digest agree again."""

    def edit_file(folder: Path) -> None:
        tensors = load_file(folder / "router.safetensors")
        change(tensors)
        save_file(tensors, folder / "router.safetensors")
        edit(router=tensor_digest({}, tensors))(folder)

    return edit_file


def first_of(folder: Path) -> Path:
    return folder / header_of(folder)["experts"][0]["path"]


def expert(change: Callable[[dict[str, torch.Tensor]], object], honest: bool = True) -> Edit:
    def edit_file(folder: Path) -> None:
        path = first_of(folder) / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        if honest:
            header = header_of(folder)
            header["experts"][0]["digest"] = read_peft(path.parent, allow_zero=True).digest
            edit(**header)(folder)

    return edit_file


def scale_first(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).mul_(2)


def grow_first(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def nan_first(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def swap_experts(folder: Path) -> None:
    header = header_of(folder)
    edit(experts=header["experts"][::-1])(folder)


def rename_expert(name: str) -> Edit:
    def change(folder: Path) -> None:
        header = header_of(folder)
        header["experts"][0] |= {"name": name, "path": f"experts/{name}"}
        edit(**header)(folder)

    return change


def write(name: str, data: bytes = b"x") -> Edit:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return change


BROKEN: list[tuple[str, str, Edit]] = [
    ("a router tensor too many", "bad_mixture", router(lambda t: t.update(extra=torch.ones(2)))),
    ("a router tensor missing", "bad_mixture", router(lambda t: t.pop(next(iter(t))))),
    ("a router tensor of another shape", "bad_mixture", router(grow_first)),
    ("a NaN in the router", "nonfinite", router(nan_first)),
    ("a router changed later", "digest", edit(router="0" * 64)),
    ("an expert changed later", "digest", expert(scale_first, honest=False)),
    ("experts in another order", "bad_value", swap_experts),
    ("an expert outside", "bad_name", rename_expert("../../../etc")),
    ("an expert that is not there", "missing_file", rename_expert("nobody")),
    ("a method of nobody", "method", edit(method="nothing")),
    ("a method that is a path", "method", edit(method="os.path:join")),
    ("a method of another kind", "bad_mixture", edit(method="loraflow")),
    ("another servability", "bad_value", edit(servability="static")),
    ("a later schema", "version", edit(schema_version=2)),
    ("an unknown key", "unknown_key", edit(parent_library="os")),
    ("another base", "base_mismatch", edit(base_digest="0" * 64)),
    ("an unknown setting", "bad_mixture", setting(surprise=1)),
    ("a setting of another type", "bad_mixture", setting(top_k="many")),
    ("more experts than there are", "bad_mixture", setting(num_experts=7, adapters=["a"] * 7)),
    ("a billion experts", "bad_value", setting(num_experts=10**9)),
    ("a terabyte of settings", "bad_value", setting(lora_alpha=10**12)),
    ("settings without end", "bad_value", setting(target_modules=["q_proj"] * 100_001)),
    ("sites that are not the experts'", "digest", edit(sites=["model.layers.0.mlp.up_proj"])),
    ("a pickle inside an expert", "pickle", write("experts/a/optimizer.pt")),
    ("code beside it", "extra_file", write("modeling.py")),
    ("a plain adapter beside it", "extra_file", write("adapter_config.json", b"{}")),
    ("an unlisted expert", "extra_file", write("experts/zz/adapter_config.json", b"{}")),
    ("no router", "missing_file", lambda folder: (folder / "router.safetensors").unlink()),
    ("no experts", "bad_value", edit(experts=[])),
]


@pytest.mark.parametrize(("label", "code", "change"), BROKEN, ids=[label for label, _, _ in BROKEN])
def test_a_broken_mixture_is_refused_for_its_fault(label, code, change, saved, base, tmp_path):
    # The order of a MoLoRA's experts is their names'; a gate's is its own.
    folder = tmp_path / "mixture"
    shutil.copytree(saved["molora"], folder)
    change(folder)
    start = time.process_time()
    with pytest.raises(UploadError) as caught, check_upload(from_folder(folder), base):
        pass
    assert caught.value.code in (code, *ALSO.get(label, ())), str(caught.value)
    assert time.process_time() - start < 5
    assert str(folder) not in str(caught.value)


# Where the layout of the files speaks before the header does.
ALSO = {
    "an unlisted expert": ("missing_file", "extra_file"),
    "an expert that is not there": ("bad_mixture",),
    "a setting of another type": ("bad_value",),
}


@pytest.mark.parametrize("method", ["molora", "mole", "smora"])
def test_a_sound_mixture_is_taken_and_bound_to_all_of_its_parts(method, saved, base):
    with check_upload(from_folder(saved[method]), base) as checked:
        header = header_of(saved[method])
        assert checked.experts == {e["name"]: e["digest"] for e in header["experts"]}
        parts = {e["path"]: e["digest"] for e in header["experts"]}
        assert checked.digest == mixture_digest(header, parts, header["router"])
        others = {
            mixture_digest(header | {"base_dtype": "x"}, parts, header["router"]),
            mixture_digest(header, dict.fromkeys(parts, "0" * 64), header["router"]),
            mixture_digest(header, parts, "0" * 64),
        }
        assert len(others) == 3 and checked.digest not in others
        again = loramux.load(model_of(Path()), checked.folder, check_base=False)
        assert again is not None, "what was checked loads"


def test_the_global_random_state_is_as_before(saved, base):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with check_upload(from_folder(saved["mole"]), base):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_count(saved, base):
    limits = UploadLimits(max_experts=1)
    with (
        pytest.raises(UploadError, match="at most 1 are allowed"),
        check_upload(from_folder(saved["molora"]), base, limits),
    ):
        pass


def test_a_reader_that_gives_a_reason_of_its_own_is_still_a_refusal(
    saved: dict[str, Path], base: BaseShape, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise FormatError("not one of ours", code="not_ours")

    monkeypatch.setattr("loramux.persist.routers.check_routers", refuse)
    with (
        pytest.raises(UploadError, match="not one of ours") as caught,
        check_upload(from_folder(saved["mole"]), base),
    ):
        pass
    assert caught.value.code == "bad_mixture"
