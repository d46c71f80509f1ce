"""Sound adapters are taken, whatever their rank, targets, scaling, kind of numbers or method."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.cases import Maker, every_variant
from fuzz.parcels import BASE, CONFIG, LINEARS, config, parcel, tensors
from loramux.formats.peft import read_peft
from loramux.formats.scaling import site_scaling
from loramux.persist.base import BaseIdentity
from loramux.registry.checks import (
    BaseShape,
    Checked,
    base_shape,
    check_upload,
    from_folder,
    from_members,
    shape_of_model,
)
from pico import FAMILIES, build_pico

RANKS = (1, 2, 3, 5, 8, 16, 31, 64, 128, 256)
DTYPES = ("F32", "F16", "BF16")
Q, K, UP, DOWN = "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"


def paths_of(*names: str, layers: tuple[int, ...] = (0, 1)) -> tuple[str, ...]:
    return tuple(path for path in LINEARS if path.endswith(names) and int(path[13]) in layers)


TARGETS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"target_modules": ["q_proj"]}, paths_of(Q)),
    ({"target_modules": ["down_proj", "k_proj"]}, paths_of(DOWN, K)),
    ({"target_modules": ["mlp.up_proj"]}, paths_of(UP)),
    ({"target_modules": ["model.layers.1.mlp.up_proj"]}, paths_of(UP, layers=(1,))),
    ({"target_modules": ["q_proj", "lm_head_of_another"]}, paths_of(Q)),
    ({"target_modules": r".*\.(q|k)_proj"}, paths_of(Q, K)),
    ({"target_modules": r"model\.layers\.0\..*_proj"}, paths_of(Q, K, UP, DOWN, layers=(0,))),
    ({"target_modules": "all-linear"}, tuple(LINEARS)),
    ({"target_modules": None}, paths_of(Q)),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, paths_of(Q, layers=(1,))),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0}, paths_of(Q, layers=(0,))),
    ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, paths_of(Q)),
    ({"layers_to_transform": [0], "layers_pattern": "layers"}, paths_of(Q, K, UP, DOWN, layers=(0,))),
)  # fmt: skip
UNEVEN: tuple[tuple[dict[str, Any], dict[str, int]], ...] = (
    ({"rank_pattern": {"q_proj": 2}}, dict.fromkeys(paths_of(Q), 2)),
    ({"rank_pattern": {r".*\.0\..*": 1, "down_proj": 7}},
     dict.fromkeys(paths_of(DOWN, layers=(1,)), 7) | dict.fromkeys(paths_of(Q, K, UP, DOWN, layers=(0,)), 1)),
    ({"rank_pattern": {"^model.layers.1.mlp.up_proj": 200}}, {paths_of(UP, layers=(1,))[0]: 200}),
    ({"alpha_pattern": {"k_proj": 32, "layers.1.mlp.up_proj": 0.5}}, {}),
    ({"alpha_pattern": {r".*_proj": 3}, "use_rslora": True}, {}),
    ({"rank_pattern": {path: i + 1 for i, path in enumerate(LINEARS)}},
     {path: i + 1 for i, path in enumerate(LINEARS)}),
)  # fmt: skip
HARMLESS: tuple[dict[str, Any], ...] = (
    {"lora_alpha": 0.25}, {"lora_alpha": -8}, {"lora_dropout": 0.1}, {"init_lora_weights": "gaussian"},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, {"revision": "main"}, {"task_type": None},
    {"peft_version": "0.21.2"}, {"megatron_core": "megatron.core"}, {"loftq_config": {}}, {"inference_mode": False},
    {"base_model_name_or_path": "../../../etc/passwd"}, {"base_model_name_or_path": None},
    {"fan_in_fan_out": True}, {"use_rslora": True},
)  # fmt: skip


def good_parcels() -> Iterator[tuple[str, dict[str, bytes]]]:
    for rank, dtype, dora in itertools.product(RANKS, DTYPES, (False, True)):
        made = tensors(rank, rank, dtype, dora=dora)
        yield (
            f"rank {rank} {dtype} {dora}",
            parcel(made, config(rank, use_dora=dora, use_rslora=dora)),
        )
    for (changes, paths), dtype in itertools.product(TARGETS, DTYPES):
        yield f"targets {changes}", parcel(tensors(1, 4, dtype, paths), config(**changes))
    for (changes, ranks), dtype in itertools.product(UNEVEN, DTYPES):
        yield f"uneven {changes}", parcel(tensors(2, 4, dtype, ranks=ranks), config(**changes))
    for changes, rank in itertools.product(HARMLESS, (2, 6)):
        yield f"settings {changes}", parcel(tensors(3, rank), config(rank, **changes))
    side = dict.fromkeys(("README.md", "tokenizer.json", ".gitattributes", "LICENSE"), b"x")
    yield "with what lies beside it", parcel() | side
    yield "in a folder of its own", {f"my adapter/{name}": data for name, data in parcel().items()}
    made = tensors()
    first = paths_of(Q)[0]
    zero = {
        n: (d, s, b"\0" * len(b)) if first in n and "_B" in n else (d, s, b)
        for n, (d, s, b) in made.items()
    }
    yield "zero at one module", parcel(zero)


def test_sound_plain_adapters_are_taken_and_have_the_digest_their_reader_computes(tmp_path: Path):
    cases = list(good_parcels())
    for number, (label, files) in enumerate(cases):
        with check_upload(from_members(files), BASE, staging=tmp_path) as checked:
            assert {f.path: f.num_bytes for f in checked.files} == {
                name.rpartition("/")[2]: len(data)
                for name, data in files.items()
                if name.endswith((CONFIG, ".safetensors"))
            }
            if number % 4 == 0:
                read = read_peft(checked.folder)
                assert checked.digest == read.digest, label
                assert checked.modules == tuple(read.sites)
                assert_norms(checked)
        assert not list(tmp_path.iterdir())
    assert len(cases) >= 120


def assert_norms(checked: Checked) -> None:
    """Against ||s B A|| computed outright."""
    read = read_peft(checked.folder)
    scale = site_scaling(read.config, {path: site.rank for path, site in read.sites.items()})
    for path, site in read.sites.items():
        dense = abs(scale[path][2]) * (site.b.double().T @ site.a.double())
        assert checked.norms[path] == pytest.approx(float(dense.norm()) / 10.0, rel=1e-6)


def test_what_is_said_of_a_checked_adapter():
    ranks = dict.fromkeys(paths_of(Q), 2)
    files = parcel(tensors(ranks=ranks), config(rank_pattern={"q_proj": 2})) | {
        "README.md": b"# hi"
    }
    with check_upload(from_members(files), BASE) as checked:
        assert (checked.method, checked.servability) == ("lora", "static")
        assert (checked.max_rank, checked.base_digest) == (4, BASE.digest)
        assert checked.config["rank_pattern"] == {"q_proj": 2}
        assert checked.notes == ("left out: README.md",)
        assert checked.num_bytes == sum(
            len(data) for name, data in files.items() if "." in name[7:]
        )
        for file in checked.files:
            assert file.staged.read_bytes() == files[file.path]
    assert not checked.folder.exists(), "the copies end with the block"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    return folder


def model_of(folder: Path) -> nn.Module:
    model = build_pico("llama")
    model.name_or_path = str(folder)
    return model


def test_every_methods_own_folders_are_taken(base_folder: Path, make: Maker, tmp_path: Path):
    base = base_shape(base_folder)
    variants = every_variant()
    for variant in variants:
        folder = tmp_path / variant.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make.attach(model_of(base_folder), variant).save(folder)
        with check_upload(from_folder(folder), base) as checked:
            is_static = (folder / CONFIG).exists()
            assert checked.method == ("lora" if is_static else variant.method)
            assert checked.base_digest == base.digest
            assert len(checked.files) == len([f for f in folder.rglob("*") if f.is_file()])
            assert all(0 < value < 10 for value in checked.norms.values())
            assert not checked.notes, variant.name
    assert len(variants) >= 39


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_read_from_its_headers_as_its_model_says(
    family: str, tmp_path: Path, make: Maker
):
    model = build_pico(family)
    model.save_pretrained(tmp_path / "base")
    base = base_shape(tmp_path / "base")
    assert dict(base.linears) == dict(shape_of_model(model, base.digest).linears)
    assert BaseShape.from_json(base.to_json()) == base
    weight = model.get_submodule(next(iter(base.linears))).weight
    assert base.norms[next(iter(base.linears))] == pytest.approx(float(weight.detach().norm()))
    for label in ("plain", "dora"):
        variant = next(v for v in every_variant() if v.name == f"lora-{label}")
        make.attach(
            model_of(tmp_path / "base") if family == "llama" else build_pico(family),
            variant,
            family,
        ).save(tmp_path / label)
        with check_upload(from_folder(tmp_path / label), base) as checked:
            assert len(checked.files) == 3, "the note of the base is checked and kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_samples_of_a_base_are_those_that_adapters_note(dtype: torch.dtype, tmp_path: Path):
    model = build_pico("gpt2", dtype=dtype)
    model.save_pretrained(tmp_path)
    base = base_shape(tmp_path)
    marks = BaseIdentity(model).marks(base.linears)
    import hashlib

    found = {p: hashlib.sha256(bytes.fromhex(h)).hexdigest()[:16] for p, h in base.heads.items()}
    assert found == marks


def test_a_base_is_read_once_and_again_when_what_is_remembered_is_broken(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from loramux.registry.checks import base as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = base_shape(base_folder)
    (memory,) = tmp_path.rglob("shape-*.json")
    for broken in (b"{", b"[]", b"{}", memory.read_bytes().replace(b"schema_version", b"x")):
        memory.write_bytes(broken)
        assert base_shape(base_folder) == first
    monkeypatch.setattr(module, "map_tensors", None)
    assert base_shape(base_folder) == first, "the weights are not read again"


def test_a_base_of_an_unlisted_family_is_read_through_its_model(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from loramux.registry.checks import base as module

    known = base_shape(base_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "FAMILIES", {})
    assert base_shape(base_folder) == known


def test_two_hundred_sound_adapters_are_what_this_file_tries():
    assert len(list(good_parcels())) + len(every_variant()) + 2 * len(FAMILIES) >= 200
