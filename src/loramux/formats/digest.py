"""Content digests: of adapters and routers, of a base checkpoint, of a model in memory.

Why: names move, contents do not. Whatever is cached or compared ("is this the base it was trained on?") is keyed by
SHA-256 over what the thing is. Hashing a checkpoint takes long, so it is done once per file and remembered. Files are
hashed without torch; it is imported for tensors in memory only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.formats.errors import FormatError
from loramux.formats.files import write_bytes
from loramux.formats.jsonio import canonical_json, read_json_object
from loramux.formats.raw import RawTensor, map_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

# Written by tools on every save; they say nothing about the function of the model.
# Not the model's function, and trainers change the last four on a live model.
IGNORED_CONFIG_KEYS = frozenset(
    {
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
_HEX = re.compile(r"[0-9a-f]{64}")


def tensor_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor | RawTensor]) -> str:
    """SHA-256 hex over the config (canonical JSON) and every tensor's name, dtype, shape and bytes."""
    names = sorted(tensors)
    manifest = [[name, *_kind(tensors[name])] for name in names]
    state = hashlib.sha256(canonical_json({"config": dict(config), "tensors": manifest}))
    for name in names:
        state.update(_bytes_of(tensors[name]))
    return state.hexdigest()


def base_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 hex of a checkpoint folder: its config.json and its tensors, however they are split over files.

    Files already hashed are recognised by path, size, inode and times and not read again.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    tensors: dict[str, str] = {}
    for path in checkpoint_files(folder):
        for name, digest in _file_digests(path).items():
            if tensors.setdefault(name, digest) != digest:
                raise FormatError(
                    f"{folder}: tensor {name!r} is in several files with different contents; "
                    "remove the files that do not belong to this checkpoint",
                    code="corrupt",
                )
    return hashlib.sha256(canonical_json({"config": kept, "tensors": tensors})).hexdigest()


def folder_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 hex over the names and bytes of all files of a folder of any kind; reads them all."""
    folder = Path(folder)
    state = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix().encode()
        state.update(len(name).to_bytes(8, "big") + name)
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def model_digest(model: nn.Module | Mapping[str, Tensor], exclude: Iterable[str] = ()) -> str:
    """`model:` and SHA-256 hex over the state of a model that has no folder; reads every weight.

    Leaves out what lies under the module paths in `exclude`; a wrapper's `base_layer` does not show in the names, so
    an attached model has the digest it had before. Never equal to a `base_digest`: the two cannot be compared.
    """
    state = model if isinstance(model, Mapping) else model.state_dict()
    return state_digest(state, getattr(model, "config", None), exclude)


def state_digest(state: Mapping[str, Tensor], config: Any, exclude: Iterable[str] = ()) -> str:
    """`model_digest` of a state that was taken from a model earlier, and that model's config."""
    skipped = tuple(f"{path}." for path in exclude)
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not f"{name}.".startswith(skipped)
    }
    fields = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    kept = {key: value for key, value in fields.items() if key not in IGNORED_CONFIG_KEYS}
    return "model:" + tensor_digest(kept, tensors)


def cache_folder() -> Path:
    """Where digests are remembered: under $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "loramux" / "digests"


def checkpoint_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_plain_name, weight_map.values())):
            raise FormatError(f"{index} has no usable weight_map", code="corrupt")
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise FormatError(
        f"{folder} holds no model.safetensors (or index of shards); save the model with "
        "save_pretrained(...), which writes safetensors",
        code="missing_file",
    )


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")


def _file_digests(path: Path) -> dict[str, str]:
    """Tensor name -> SHA-256 of its dtype, shape and bytes; remembered per file."""
    memory = cache_folder() / f"{_file_key(path)}.json"
    known = _recall(memory)
    if known is not None:
        return known
    digests: dict[str, str] = {}
    try:
        for name, tensor in map_tensors(path).items():
            digests[name] = _tensor_sha(tensor)
    except (FormatError, OSError) as error:
        raise FormatError(f"{path} cannot be hashed: {error}", code="corrupt") from None
    _remember(memory, digests)
    return digests


def _file_key(path: Path) -> str:
    """Changes whenever the file can have changed: ctime also moves when someone sets mtime back."""
    try:
        real = path.resolve(strict=True)
        info = real.stat()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error}", code="missing_file") from None
    facts = [str(real), info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def _recall(memory: Path) -> dict[str, str] | None:
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(known, dict) and all(
        isinstance(digest, str) and _HEX.fullmatch(digest) for digest in known.values()
    ):
        return known
    return None


def _remember(memory: Path, digests: dict[str, str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(memory, canonical_json(digests))
    except OSError:
        return  # a read-only home costs time, not correctness


def _tensor_sha(tensor: Tensor | RawTensor) -> str:
    state = hashlib.sha256(canonical_json(_kind(tensor)))
    state.update(_bytes_of(tensor))
    return state.hexdigest()


def _kind(tensor: Tensor | RawTensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _bytes_of(tensor: Tensor | RawTensor) -> Any:
    if isinstance(tensor, RawTensor):
        return tensor.raw()
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:  # a quantised weight is several tensors behind one name
        names, _ = parts()
        return b"".join(bytes(_bytes_of(getattr(tensor, name))) for name in names)
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
