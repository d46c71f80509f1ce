"""Whatever is wrong with an adapter folder, there is one clear refusal, and nothing has happened before it."""

import json
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.samples import PATHS, adapter, edit_config, edit_tensors, rows, snapshot
from loramux.formats import FormatError
from loramux.formats.fields import KNOWN_KEYS
from loramux.formats.peft import read_peft, write_peft
from loramux.formats.scaling import rank_and_scale
from loramux.formats.tensors import AdapterTensors, SiteTensors, zero_sites

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", adapter())
    return tmp_path / "adapter"


def _refused(folder: Path, code: str, *, says: str = "") -> None:
    with pytest.raises(FormatError) as caught:
        read_peft(folder)
    assert caught.value.code == code, str(caught.value)
    assert says in str(caught.value)


def _header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "A without B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), "missing_tensor", "lora_B.weight"),
    "B without A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), "missing_tensor", "lora_A.weight"),
    "no tensors": (lambda t: t.clear(), "missing_tensor", ""),
    "ranks of A and B differ": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(3, 6)}), "rank", "q_proj"
    ),
    "rank not of the config": (
        lambda t: t.update(
            {f"{Q0}.lora_A.weight": torch.ones(3, 6), f"{Q0}.lora_B.weight": torch.ones(8, 3)}
        ), "rank", "config 2",
    ),
    "transposed A": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(6, 2)}), "rank", "transposed"
    ),
    "NaN": (lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan")), "nonfinite", f"{Q0}.lora_A"),
    "one infinity": (
        lambda t: t[f"{Q0}.lora_B.weight"][3].fill_(-float("inf")), "nonfinite", f"{Q0}.lora_B"
    ),
    "foreign tensor": (
        lambda t: t.update({"model.norm.weight": torch.ones(6)}), "unexpected_tensor", "model.norm"
    ),
    "no prefix": (
        lambda t: t.update({n.removeprefix("base_model.model."): t.pop(n) for n in list(t)}),
        "unexpected_tensor", "base_model.model.MODULE",
    ),
    "path in a name": (
        lambda t: t.update({"base_model.model.../../x.lora_A.weight": torch.ones(2, 6)}),
        "unexpected_tensor", "..",
    ),
    "module outside target_modules": (
        lambda t: t.update({n.replace("q_proj", "k_proj"): v.clone() for n, v in t.items()}),
        "unexpected_tensor", "k_proj",
    ),
    "embedding LoRA": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}),
        "unsupported", "embed_tokens.lora_embedding_A",
    ),
    "bias of B": (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(8)}), "unsupported", "lora_bias"),
    "saved module": (
        lambda t: t.update({"base_model.model.score.modules_to_save.weight": torch.ones(2, 6)}),
        "unsupported", "modules_to_save",
    ),
    "saved head": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(9, 6)}),
        "unsupported", "save_embedding_layers=False",
    ),
    "magnitude without DoRA": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(8)}),
        "unexpected_tensor", "use_dora is false",
    ),
    "integers": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 6, dtype=torch.int8)}), "dtype", "I8"
    ),
    "8-bit floats": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 6).to(torch.float8_e4m3fn)}),
        "dtype", "F8_E4M3",
    ),
    "convolution": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 6, 1, 1)}), "shape", "not matrices"
    ),
    "sharded": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 0)}), "shape", "gather"),
    "every B zero": (
        lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n], "no_op", "changes nothing"
    ),
}  # fmt: skip

CONFIG_EDITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt key": ({"lora_alfa": 3}, "unknown_key", "'lora_alfa' -> 'lora_alpha'"),
    "unknown key": ({"zzz_qqq": 3}, "unknown_key", "zzz_qqq"),
    "another method": ({"peft_type": "IA3"}, "peft_type", "only 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type", "None"),
    "MixLoRA": ({"peft_type": "MIXLORA"}, "peft_type", "read_mixlora"),
    "rank 0": ({"r": 0}, "bad_value", "r is 0"),
    "rank as text": ({"r": "8"}, "bad_value", "'8'"),
    "rank true": ({"r": True}, "bad_value", "True"),
    "absurd rank": ({"r": 10**9}, "bad_value", "32768"),
    "alpha 0": ({"lora_alpha": 0}, "bad_value", "other than 0"),
    "huge alpha": ({"lora_alpha": 10**400}, "bad_value", "lora_alpha"),
    "dropout 1": ({"lora_dropout": 1.0}, "bad_value", "[0, 1)"),
    "other rank": ({"r": 4}, "rank", "tensors 2, config 4"),
    "other rank in the pattern": ({"rank_pattern": {"q_proj": 4}}, "rank", "config 4"),
    "rank pattern of text": ({"rank_pattern": {"q_proj": "4"}}, "bad_value", "rank_pattern"),
    "pattern that is no regex": ({"alpha_pattern": {"(": 4}}, "bad_pattern", "'('"),
    "pattern that explodes": ({"alpha_pattern": {"(.*)*x": 4}}, "bad_pattern", "for ever"),
    "targets that explode": ({"target_modules": "(a+)+b"}, "bad_pattern", "target_modules"),
    "no targets": ({"target_modules": []}, "unexpected_tensor", "target_modules"),
    "targets of numbers": ({"target_modules": [1]}, "bad_value", "target_modules"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "unexpected_tensor", "q_proj"),
    "layer not meant": ({"layers_to_transform": [1]}, "unexpected_tensor", "layers.0"),
    "DoRA without magnitudes": ({"use_dora": True}, "missing_tensor", "lora_magnitude_vector"),
    "trained biases": ({"bias": "lora_only"}, "unsupported", "'bias'"),
    "saved modules": ({"modules_to_save": ["score"]}, "unsupported", "'modules_to_save'"),
    "layer replication": ({"layer_replication": [[0, 2]]}, "unsupported", "'layer_replication'"),
    "parameters": ({"target_parameters": ["x"]}, "unsupported", "'target_parameters'"),
    "tokens": ({"trainable_token_indices": [1]}, "unsupported", "'trainable_token_indices'"),
    "bias of B": ({"lora_bias": True}, "unsupported", "'lora_bias'"),
    "QA-LoRA": ({"use_qalora": True}, "unsupported", "'use_qalora'"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "unsupported", "'alora_invocation_tokens'"),
    "Megatron": ({"megatron_config": {"a": 1}}, "unsupported", "'megatron_config'"),
    "KaSA": ({"kasa_config": {"a": 1}}, "unsupported", "'kasa_config'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "unsupported", "path_initial_model"),
    "unknown initialisation": ({"init_lora_weights": "magic"}, "bad_value", "magic"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSOR_EDITS)
def test_wrong_tensors_are_refused_by_name(folder, case):
    edit, code, says = TENSOR_EDITS[case]
    edit_tensors(folder, edit)
    _refused(folder, code, says=says)


@pytest.mark.parametrize("case", CONFIG_EDITS)
def test_wrong_configs_are_refused_by_field(folder, case):
    changes, code, says = CONFIG_EDITS[case]
    edit_config(folder, **changes)
    _refused(folder, code, says=says)


def test_features_that_are_off_do_not_disturb(folder):
    off = {"modules_to_save": [], "trainable_token_indices": None, "layer_replication": []}
    edit_config(folder, megatron_config=None, bias="none", lora_bias=False, use_qalora=False, **off)
    assert list(read_peft(folder).sites) == list(adapter().sites)


def test_every_field_of_the_installed_peft_is_known():
    import dataclasses

    from peft import LoraConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} <= KNOWN_KEYS


def test_a_pickled_adapter_is_refused_with_a_conversion_that_works(folder):
    given = read_peft(folder)
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FormatError, match="throw-away environment") as caught:
        read_peft(folder)
    assert caught.value.code == "pickle"
    command = next(line for line in str(caught.value).splitlines() if "python -c" in line)
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    subprocess.run([sys.executable, *arguments[1:]], cwd=folder, check=True, timeout=120)
    assert read_peft(folder).digest == given.digest


def test_a_pickle_beside_the_safetensors_is_never_opened(folder):
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04not a pickle")
    assert read_peft(folder).sites


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    _refused(folder, "missing_file", says=name)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    _refused(tmp_path / "nowhere", "missing_file")


def test_text_that_is_no_json_is_refused(folder):
    for text in ("{", "", "[" * 100_000, '{"r": NaN}', '{"r": 1e999}', "\xff"):
        (folder / CONFIG).write_bytes(text.encode("latin-1"))
        _refused(folder, "bad_json")
    (folder / CONFIG).write_text("[]")
    _refused(folder, "bad_json", says="expected an object")


def test_a_key_given_twice_is_refused(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("{", '{"r": 4,', 1))
    _refused(folder, "duplicate_key", says="'r'")


def test_a_tensor_listed_twice_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name, entry = next((n, e) for n, e in header.items() if n != "__metadata__")
    text = (
        data[8 : 8 + length].rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    )
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    _refused(folder, "duplicate_key", says="lora_")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    _refused(folder, "corrupt", says="Download or save it again")


def test_a_header_longer_than_the_file_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + data[8:])
    _refused(folder, "corrupt", says="claims")


def test_overlapping_and_absurd_tensors_are_refused(folder):
    first, second = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    original = (folder / WEIGHTS).read_bytes()
    _header(folder, lambda h: h[first].update(data_offsets=h[second]["data_offsets"]))
    _refused(folder, "corrupt")
    (folder / WEIGHTS).write_bytes(original)
    _header(folder, lambda h: h[first].update(shape=[2**60, 6]))
    _refused(folder, "shape")
    (folder / WEIGHTS).write_bytes(original)
    _header(folder, lambda h: h[first].update(shape=[-2, 6]))
    _refused(folder, "corrupt", says="malformed")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_and_pipes_are_refused(folder, name):
    kept = folder.parent / name
    (folder / name).rename(kept)
    (folder / name).symlink_to(kept)
    _refused(folder, "unsafe_path", says="link")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    _refused(folder, "unsafe_path", says="regular file")


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    blobs, snapshot_ = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    write_peft(snapshot_, adapter())
    for index, name in enumerate((CONFIG, WEIGHTS)):
        (snapshot_ / name).rename(blobs / str(index))
        (snapshot_ / name).symlink_to(f"../../blobs/{index}")
    assert read_peft(snapshot_).digest == adapter().digest


def test_a_zero_adapter_is_accepted_to_resume_it_and_single_zero_sites_are_listed(folder):
    def zero(names):
        edit_tensors(
            folder, lambda t: [t[f"base_model.model.{n}.lora_B.weight"].zero_() for n in names]
        )

    zero(list(PATHS)[:1])
    assert zero_sites(read_peft(folder)) == list(PATHS)[:1]
    zero(list(PATHS))
    _refused(folder, "no_op")
    assert zero_sites(read_peft(folder, allow_zero=True)) == list(adapter().sites)


def test_nothing_is_written_when_the_adapter_to_write_is_not_sound(tmp_path):
    good = adapter()
    path = next(iter(good.sites))
    site = good.sites[path]
    bad_rows = AdapterTensors(
        good.config, good.sites | {path: SiteTensors(site.a * float("nan"), site.b)}
    )
    bad_rank = AdapterTensors(good.config | {"r": 5}, good.sites)
    bad_key = AdapterTensors(good.config | {"rr": 5}, good.sites)
    for bad, code in ((bad_rows, "nonfinite"), (bad_rank, "rank"), (bad_key, "unknown_key")):
        with pytest.raises(FormatError) as caught:
            write_peft(tmp_path / "new", bad)
        assert caught.value.code == code
    assert snapshot(tmp_path) == {}


def test_a_single_site_with_another_rank_than_the_config_is_refused():
    with pytest.raises(FormatError, match="say 8"):
        rank_and_scale({"r": 8}, "q_proj", 4)
    assert rank_and_scale({}, "q_proj", 8) == (8, 8, 1.0)


def test_a_rank_of_its_own_needs_rank_pattern(tmp_path):
    good = adapter()
    sites = dict(good.sites)
    path = next(iter(sites))
    sites[path] = rows(3, sites[path].d_in, sites[path].d_out)
    with pytest.raises(FormatError, match="rank_pattern"):
        write_peft(tmp_path, AdapterTensors.build(good.config, sites))
    write_peft(tmp_path, AdapterTensors.build(good.config | {"rank_pattern": {path: 3}}, sites))
    assert read_peft(tmp_path).sites[path].rank == 3
