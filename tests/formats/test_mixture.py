"""A mixture folder holds plain PEFT adapters bound by digests; it is replaced in one step or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.samples import adapter, edit_config, edit_tensors, same_tensors, snapshot
from loramux.formats import FormatError, files
from loramux.formats.mixture import is_mixture, read_mixture, write_mixture
from loramux.formats.peft import read_peft, write_peft
from loramux.formats.tensors import AdapterTensors, SiteTensors, named_tensors

ROUTER = {
    "model.layers.0/gate": torch.arange(12.0).view(3, 4),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
}
EXPERTS = {"math": adapter(seed=1), "code-2": adapter(rank=3, seed=2), "default": adapter(seed=3)}
CONFIG = "mixture_config.json"


def write(folder: Path, **changes: Any) -> str:
    fields: dict[str, Any] = {
        "method": "milora",
        "config": {"r": 8, "top_k": 3, "target_modules": ("q_proj",)},
        "servability": "per_request",
        "base_digest": "ab" * 32,
        "base_name": "some/base",
        "base_dtype": "bfloat16",
        "experts": EXPERTS,
        "router": ROUTER,
    }
    return write_mixture(folder, **(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "mixture")
    return tmp_path / "mixture"


def _zero(sound: AdapterTensors) -> AdapterTensors:
    sites = {path: SiteTensors(s.a, torch.zeros_like(s.b)) for path, s in sound.sites.items()}
    return AdapterTensors.build(sound.config, sites)


def test_what_was_written_is_read(tmp_path):
    digest = write(tmp_path / "new" / "mixture")
    found = read_mixture(tmp_path / "new" / "mixture")
    assert (found.method, found.servability) == ("milora", "per_request")
    assert found.config == {"r": 8, "top_k": 3, "target_modules": ["q_proj"]}
    assert (found.base_name, found.base_digest, found.base_dtype) == (
        "some/base",
        "ab" * 32,
        "bfloat16",
    )
    assert list(found.experts) == list(EXPERTS), "experts keep their declared order"
    assert all(found.experts[name].digest == EXPERTS[name].digest for name in EXPERTS)
    assert same_tensors(found.router, ROUTER)
    assert found.sites == tuple(EXPERTS["math"].sites)
    assert found.digest == digest


def test_every_expert_alone_is_a_peft_folder_and_the_top_is_not(folder):
    from peft import PeftConfig

    for name, given_ in EXPERTS.items():
        alone = read_peft(folder / "experts" / name)
        assert same_tensors(named_tensors(alone.sites), named_tensors(given_.sites))
        assert PeftConfig.from_pretrained(folder / "experts" / name).r == given_.config["r"]
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(folder)
    with pytest.raises(FormatError, match="mixture"):
        read_peft(folder)


def test_the_digest_names_the_content_not_the_place(tmp_path):
    first = write(tmp_path / "a")
    assert write(tmp_path / "b") == first
    assert write(tmp_path / "b", router=ROUTER | {"steps": torch.tensor(8)}) != first
    assert write(tmp_path / "b", config={"r": 8, "top_k": 2}) != first
    assert write(tmp_path / "b", experts=dict(reversed(EXPERTS.items()))) != first


def test_a_mixture_without_router_tensors_is_legal(tmp_path):
    write(tmp_path / "m", router={})
    assert read_mixture(tmp_path / "m").router == {}


def test_writing_again_replaces_all_and_keeps_the_users_own_files(folder):
    (folder / "README.md").write_text("mine")
    write(folder, experts={"only": adapter(seed=9)})
    assert list(read_mixture(folder).experts) == ["only"]
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(p.name for p in (folder / "experts").iterdir()) == ["only"]
    assert [p.name for p in folder.parent.iterdir()] == ["mixture"], "no scraps beside it"


@pytest.mark.parametrize("step", ["write_tensors", "write_json", "write_peft"])
def test_a_failure_in_mid_write_leaves_the_old_mixture(folder, monkeypatch, step):
    before = snapshot(folder)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"loramux.formats.mixture.{step}", fail)
    with pytest.raises(OSError, match="disk full"):
        write(folder, config={"changed": 1})
    assert snapshot(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["mixture"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_kill_between_the_renames_loses_nothing(folder, monkeypatch, fails_at):
    before, rename, calls = read_mixture(folder).digest, os.rename, []

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        calls.append(args)
        if len(calls) == fails_at:
            raise Killed
        rename(*args)

    monkeypatch.setattr(files.os, "rename", killed)
    with pytest.raises(Killed):
        write(folder, config={"changed": 1})
    monkeypatch.undo()
    assert is_mixture(folder)
    assert read_mixture(folder).digest == before


def test_the_old_mixture_is_put_back_when_the_new_one_cannot_take_its_place(folder, monkeypatch):
    before, rename = snapshot(folder), os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", refuse_new)
    with pytest.raises(OSError, match="no"):
        write(folder, config={"changed": 1})
    assert snapshot(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["mixture"]


@pytest.mark.parametrize("kind", ["notes", "adapter", "model", "file", "link", "foreign weights"])
def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("x")
    elif kind == "link":
        write(tmp_path / "real")
        target.symlink_to(tmp_path / "real")
    elif kind == "adapter":
        write_peft(target, adapter())
    elif kind == "foreign weights":
        write(target)
        (target / "model.bin").write_text("x")
    else:
        target.mkdir()
        (target / ("notes.txt" if kind == "notes" else "config.json")).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(FormatError) as caught:
        write(target)
    assert caught.value.code == "not_ours"
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "m").mkdir()
    write(tmp_path / "m")
    assert is_mixture(tmp_path / "m")
    assert not is_mixture(tmp_path)


def test_an_adapter_is_not_written_over_a_mixture(folder):
    before = snapshot(folder)
    with pytest.raises(FormatError, match="another folder"):
        write_peft(folder, adapter())
    assert snapshot(folder) == before


def _entry(folder: Path, index: int, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["experts"][index].update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def _edit(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, CONFIG, **changes)


def _link_expert(folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / "experts" / "math", outside)
    (folder / "experts" / "math").symlink_to(outside)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another expert": (lambda f: write_peft(f / "experts" / "math", adapter(seed=7)), "digest"),
    "another scale": (lambda f: edit_config(f / "experts" / "math", lora_alpha=5), "digest"),
    "another router": (
        lambda f: edit_tensors(f, lambda t: t["steps"].add_(1), "router.safetensors"), "digest"
    ),
    "router with NaN": (
        lambda f: edit_tensors(f, lambda t: t["model.layers.0/gate"].fill_(torch.nan), "router.safetensors"),
        "nonfinite",
    ),
    "no router": (lambda f: (f / "router.safetensors").unlink(), "missing_file"),
    "other sites": (_edit(sites=["x"]), "digest"),
    "a later version": (_edit(schema_version=2), "version"),
    "no version": (_edit(schema_version=None), "version"),
    "unknown key": (_edit(servabilty="static"), "unknown_key"),
    "unknown servability": (_edit(servability="sometimes"), "bad_value"),
    "no experts": (_edit(experts=[]), "bad_value"),
    "experts of text": (_edit(experts=["math"]), "bad_value"),
    "no method": (_edit(method=""), "bad_value"),
    "missing expert": (lambda f: shutil.rmtree(f / "experts" / "math"), "missing_file"),
    "linked expert": (_link_expert, "unsafe_path"),
    "unlisted expert": (lambda f: write_peft(f / "experts" / "more", adapter()), "extra_file"),
    "extra weights": (lambda f: (f / "more.safetensors").write_bytes(b""), "extra_file"),
    "extra pickle": (lambda f: (f / "experts/math/adapter_model.bin").write_bytes(b""), "extra_file"),
    "adapter at the top": (lambda f: (f / "adapter_config.json").write_text("{}"), "extra_file"),
    "adapter weights at the top": (
        lambda f: shutil.copy(f / "router.safetensors", f / "adapter_model.safetensors"), "extra_file"
    ),
    "traversal": (lambda f: _entry(f, 0, name="../x", path="experts/../x"), "bad_name"),
    "other path": (lambda f: _entry(f, 0, path="/etc"), "unsafe_path"),
    "capital name": (lambda f: _entry(f, 0, name="Math", path="experts/Math"), "bad_name"),
    "twice": (lambda f: _entry(f, 0, name="default", path="experts/default"), "bad_name"),
    "no digest": (lambda f: _entry(f, 0, digest="12"), "bad_value"),
    "key of an expert": (lambda f: _entry(f, 0, weight=1), "unknown_key"),
    "no config": (lambda f: (f / CONFIG).unlink(), "missing_file"),
    "broken config": (lambda f: (f / CONFIG).write_text("{"), "bad_json"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_changed_mixture_is_refused(folder, case):
    damage, code = DAMAGE[case]
    damage(folder)
    with pytest.raises(FormatError) as caught:
        read_mixture(folder)
    assert caught.value.code == code, str(caught.value)


BAD_NAMES = ["", ".", "..", ".a", "a/b", "a\\b", "a b", "Ä", "a\0", "A", "-a", "a" * 129, "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_expert_names_that_could_leave_the_folder_are_refused_before_writing(tmp_path, name):
    with pytest.raises(FormatError) as caught:
        write(tmp_path / "m", experts={name: adapter()})
    assert caught.value.code == "bad_name"
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"servability": "never"}, "bad_value"),
        ({"experts": {}}, "bad_value"),
        ({"config": {"a": {1, 2}}}, "bad_json"),
        ({"config": {"a": float("nan")}}, "bad_json"),
        ({"router": {"x": torch.tensor([float("inf")])}}, "nonfinite"),
    ],
)
def test_an_unsound_mixture_is_not_written(tmp_path, changes, code):
    with pytest.raises(FormatError) as caught:
        write(tmp_path / "m", **changes)
    assert caught.value.code == code
    assert snapshot(tmp_path) == {}


def test_one_zero_expert_is_fine_and_all_zero_needs_permission(tmp_path):
    experts = {"a": adapter(), "b": _zero(adapter())}
    write(tmp_path / "m", experts=experts)
    assert list(read_mixture(tmp_path / "m").experts) == ["a", "b"]
    write(tmp_path / "m", experts={"b": experts["b"]})
    with pytest.raises(FormatError) as caught:
        read_mixture(tmp_path / "m")
    assert caught.value.code == "no_op"
    assert list(read_mixture(tmp_path / "m", allow_zero=True).experts) == ["b"]


def test_a_config_changed_in_memory_still_gives_a_readable_folder(tmp_path):
    changed = adapter()
    changed.config["lora_alpha"] = 32
    write(tmp_path / "m", experts={"a": changed})
    assert read_mixture(tmp_path / "m").experts["a"].config["lora_alpha"] == 32


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_in_any_field_is_read_or_refused(folder, data):
    original = (folder / CONFIG).read_bytes()
    config = json.loads(original)
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
    else:
        config["experts"][0][data.draw(st.sampled_from(["name", "path", "digest"]))] = data.draw(
            JSON
        )
    (folder / CONFIG).write_text(json.dumps(config))
    try:
        read_mixture(folder)
    except FormatError:
        pass
    finally:
        (folder / CONFIG).write_bytes(original)
