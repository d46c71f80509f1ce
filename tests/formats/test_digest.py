"""Digests name contents: equal for equal contents, different for any change, and paid for once per file."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.samples import adapter
from loramux.formats import FormatError, digest
from loramux.formats.digest import base_digest, model_digest, tensor_digest
from loramux.formats.raw import map_tensors
from pico import build_pico


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build_pico("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors of files that were really read and hashed."""
    seen: list[int] = []
    original = digest._tensor_sha

    def counted(tensor: torch.Tensor) -> str:
        seen.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(digest, "_tensor_sha", counted)
    return seen


def test_the_digest_is_the_documented_sha256():
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]], dtype=torch.int64)}
    manifest = b'{"config":{"x":1},"tensors":[["a","int64",[1,1]],["b","float32",[2]]]}'
    raw = (3).to_bytes(8, "little") + tensors["b"].numpy().tobytes()
    assert tensor_digest({"x": 1}, tensors) == hashlib.sha256(manifest + raw).hexdigest()


def test_every_part_of_the_content_counts_and_its_order_and_layout_do_not():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    digests = {
        tensor_digest({"r": 1}, tensors),
        tensor_digest({"r": 2}, tensors),
        tensor_digest({"r": 1}, tensors | {"a": tensors["a"].view(3, 2)}),
        tensor_digest({"r": 1}, tensors | {"a": -tensors["a"]}),
        tensor_digest({"r": 1}, tensors | {"b": torch.zeros(2, dtype=torch.float16)}),
        tensor_digest({"r": 1}, {"a": tensors["a"], "c": tensors["b"]}),
        tensor_digest({"r": 1}, {"a": tensors["a"]}),
    }
    assert len(digests) == 7
    other_order = dict(reversed(tensors.items()))
    assert tensor_digest({"r": 1}, other_order) in digests
    other_layout = tensors | {"a": tensors["a"].t().contiguous().t()}
    assert not other_layout["a"].is_contiguous()
    assert tensor_digest({"r": 1}, other_layout) == tensor_digest({"r": 1}, tensors)


def test_adapters_differ_by_config_and_by_a_single_bit():
    one = adapter()
    assert one.digest == adapter().digest
    assert one.digest != adapter(lora_dropout=0.1).digest
    assert one.digest != adapter(seed=1).digest


def test_a_base_is_hashed_once_and_again_only_when_a_file_changed(base, hashed):
    first = base_digest(base)
    read = len(hashed)
    assert read == len(load_file(base / "model.safetensors"))
    assert base_digest(base) == first
    assert len(hashed) == read, "the second time nothing is read"
    info = (base / "model.safetensors").stat()
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(base / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert base_digest(base) != first, "not even with its old time stamp"
    assert len(hashed) == 2 * read


def test_a_base_is_the_same_however_its_tensors_are_split_or_who_saved_it(base, tmp_path):
    first = base_digest(base)
    build_pico("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    changed = dict(reversed((config | {"transformers_version": "9.9"}).items()))
    (tmp_path / "shards" / "config.json").write_text(json.dumps(changed, indent=7))
    assert base_digest(tmp_path / "shards") == first


def test_another_dtype_weight_or_config_is_another_base(base, tmp_path):
    digests = {base_digest(base)}
    build_pico("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    build_pico("llama", seed=1).save_pretrained(tmp_path / "seed")
    digests |= {base_digest(tmp_path / name) for name in ("bf16", "seed")}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    digests.add(base_digest(base))
    assert len(digests) == 4


def test_a_broken_or_unwritable_cache_only_costs_time(base, own_cache, hashed, monkeypatch):
    first = base_digest(base)
    (memory,) = (own_cache / "loramux" / "digests").iterdir()
    for broken in (b"{", b"[]", b'{"a": "short"}', b'{"a": 3}'):
        memory.write_bytes(broken)
        assert base_digest(base) == first
    blocked = own_cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert base_digest(base) == first


def test_checkpoints_that_cannot_be_hashed_are_refused(base):
    save_file({"extra": torch.ones(1)}, base / "other.safetensors")
    index = base / "model.safetensors.index.json"
    for weight_map in ({"a": "../x"}, {"a": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match="weight_map"):
            base_digest(base)
    index.unlink()
    (base / "model.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match="cannot be hashed"):
        base_digest(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(FormatError, match="writes safetensors"):
        base_digest(base)


def test_a_model_in_memory_has_a_digest_that_wrapping_does_not_change():
    first = model_digest(build_pico("llama"))
    assert first.startswith("model:")
    assert model_digest(build_pico("llama")) == first
    assert model_digest(build_pico("llama", seed=1)) != first
    wrapped = build_pico("llama")
    linear = wrapped.model.layers[0].self_attn.q_proj
    holder = torch.nn.Module()
    holder.base_layer, holder.lora_rows = linear, torch.nn.Linear(2, 2)
    wrapped.model.layers[0].self_attn.q_proj = holder
    assert model_digest(wrapped, exclude=["model.layers.0.self_attn.q_proj.lora_rows"]) == first
    assert model_digest(wrapped) != first


def test_named_tensors_can_be_given_instead_of_a_model():
    tensors = {"layer.base_layer.weight": torch.ones(2)}
    assert model_digest(tensors) == model_digest({"layer.weight": torch.ones(2)})


KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
)


def test_files_have_the_digest_of_their_tensors_whatever_numbers_they_hold(tmp_path):
    bits = torch.randint(0, 2, (3, 40), dtype=torch.uint8, generator=torch.manual_seed(0))
    tensors = {f"{kind}": bits.clone().view(kind) for kind in KINDS}
    tensors |= {
        "odd": bits[:, :1].contiguous(),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "all.safetensors")
    assert tensor_digest({}, map_tensors(tmp_path / "all.safetensors")) == tensor_digest(
        {}, tensors
    )
