"""Which base an adapter belongs to: digest of the model it was trained on, and the check on loading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from loramux.core.attach import HOLDER
from loramux.formats.digest import base_digest, model_digest
from loramux.formats.errors import FormatError
from loramux.formats.jsonio import read_json_object, write_json

RECORD = "loramux.json"  # beside a PEFT folder's own files: which base it belongs to
SAMPLE = 32  # entries per weight
IN_MEMORY = "model:"  # how `model_digest` begins


def digest_of_base(model: nn.Module) -> str:
    """Digest of the checkpoint the model came from (folder or hub cache), or of its weights where there is none."""
    folder = checkpoint_folder(str(getattr(model, "name_or_path", "") or ""))
    return model_digest(model, exclude=(HOLDER,)) if folder is None else base_digest(folder)


def checkpoint_folder(name: str) -> Path | None:
    """The folder behind a model's name: itself, or its snapshot in the hub's cache."""
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path that is gone, not a hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_base_digest(model: nn.Module, expected: str | None, name: str | None) -> None:
    """Refuse another base than the one recorded; a mixture that records none is taken as it is."""
    if expected is None:
        return
    # A base that was only in memory when the mixture was saved was digested by its weights.
    in_memory = expected.startswith(IN_MEMORY)
    found = model_digest(model, exclude=(HOLDER,)) if in_memory else digest_of_base(model)
    if found != expected:
        raise FormatError(
            f"this mixture was trained on {name or 'another base'} (digest {expected[:12]}), the model is "
            f"{getattr(model, 'name_or_path', '') or 'unnamed'} (digest {found[:12]}); load that base, or pass "
            "check_base=False if you know that it holds the same weights in another form"
        )


def write_base_record(folder: Path, model: nn.Module, paths: Iterable[str]) -> None:
    """Note the base of a plain adapter, whose PEFT files have no place for it. PEFT ignores this file."""
    record = {
        "schema_version": 1,
        "base_name": getattr(model, "name_or_path", "") or "",
        "base_sample": base_sample(model, paths),
    }
    write_json(folder / RECORD, record)


def check_base_record(folder: Path, model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse another base than the one noted; folders of other tools note none and are taken as they are."""
    if not (folder / RECORD).is_file():
        return
    record = read_json_object(folder / RECORD)
    found, expected = base_sample(model, paths), record.get("base_sample")
    if found is not None and expected is not None and found != expected:
        raise FormatError(
            f"{folder} was trained on another base ({record.get('base_name') or 'unnamed'}): the weights of the "
            "linears it targets differ; load that base, or pass check_base=False if you know better"
        )


def base_sample(model: nn.Module, paths: Iterable[str]) -> str | None:
    """SHA-256 over the shape and the first entries of the targeted weights, in bf16 so that a cast base is the same.

    None where weights are quantised. A sample, not a digest: it tells bases apart, it does not prove them equal.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        if not weight.is_floating_point():
            return None
        head = weight.detach().reshape(-1)[:SAMPLE].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{path}{tuple(weight.shape)}".encode())
        digest.update(head.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
