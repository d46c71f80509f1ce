"""Which base an adapter belongs to: digest of the model it was trained on, and the check on loading."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from loramux.core.attach import HOLDER
from loramux.formats.digest import base_digest, model_digest
from loramux.formats.errors import FormatError

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
