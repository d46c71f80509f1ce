"""Which base an adapter belongs to: digest of the model it was trained on, and the check on loading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from loramux.core.attach import HOLDER
from loramux.formats.digest import base_digest, model_digest, state_digest
from loramux.formats.errors import OTHER_BASE, FormatError
from loramux.formats.jsonio import read_json_object, write_json

RECORD = "loramux.json"  # beside a PEFT folder's own files: which base it belongs to
SAMPLE = 32  # entries per weight
# Attributes of a model whose weights are no longer in one place: samples of its linears, its digest.
KEPT, KEPT_DIGEST = "_loramux_sample", "_loramux_digest"
IN_MEMORY = "model:"  # how `model_digest` begins


def digest_of_base(model: nn.Module) -> str:
    """Digest of the checkpoint the model came from (folder or hub cache), or of its weights where there is none."""
    kept: str | None = vars(model).get(KEPT_DIGEST)
    if kept is not None:
        return kept
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


class BaseIdentity:
    """What tells one model from another, computed once per model: an engine asks again for every adapter it loads.

    Make it before anything is attached to the model; it keeps the weights it saw, so replaced linears do not matter.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._state = model.state_dict()
        self._digests: dict[bool, str] = {}
        self._heads: dict[str, bytes | None] = dict(vars(model).get(KEPT, {}))

    def check_digest(self, expected: str | None, name: str | None) -> None:
        """Refuse another base than the one recorded; a mixture that records none is taken as it is."""
        if expected is None:
            return
        # A base that was only in memory when the mixture was saved was digested by its weights.
        found = self._digest(expected.startswith(IN_MEMORY))
        if found != expected:
            raise FormatError(
                f"this mixture was trained on another base ({name or 'unnamed'}, digest {expected[:12]}), the model is "
                f"{getattr(self.model, 'name_or_path', '') or 'unnamed'} (digest {found[:12]}); load that base, or "
                "pass check_base=False if you know that it holds the same weights in another form",
                code=OTHER_BASE,
            )

    def _digest(self, of_weights: bool) -> str:
        if of_weights not in self._digests:
            self._digests[of_weights] = (
                state_digest(self._state, getattr(self.model, "config", None), (HOLDER,))
                if of_weights
                else digest_of_base(self.model)
            )
        return self._digests[of_weights]

    def check_record(self, folder: Path, paths: Iterable[str]) -> None:
        """Refuse another base than the one noted; folders of other tools note none and are taken as they are."""
        if not (folder / RECORD).is_file():
            return
        record = read_json_object(folder / RECORD)
        paths = list(paths)
        found, expected = self.sample(paths), record.get("base_sample")
        differs = found is not None and expected is not None and found != expected
        if differs or (expected is None and self._differs(record.get("base_sites"), paths)):
            raise FormatError(
                f"{folder} was trained on another base ({record.get('base_name') or 'unnamed'}): the weights of the "
                "linears it targets differ; load that base, or pass check_base=False if you know better",
                code=OTHER_BASE,
            )

    def sample(self, paths: Iterable[str]) -> str | None:
        """SHA-256 over shape and first entries of the targeted weights, in bf16 so that a cast base is the same.

        None where weights are quantised. A sample, not a digest: it tells bases apart, it does not prove them equal.
        """
        digest = hashlib.sha256()
        for path in sorted(paths):
            if path not in self._heads:
                self._heads[path] = _head(path, self._weight(path))
            head = self._heads[path]
            if head is None:
                return None
            digest.update(head)
        return digest.hexdigest()

    def marks(self, paths: Iterable[str]) -> dict[str, str]:
        """The same sample of each linear by itself, shortened: tells apart the bases of adapters with other targets."""
        self.sample(paths)
        return {
            path: hashlib.sha256(head).hexdigest()[:16]
            for path in paths
            if (head := self._heads.get(path)) is not None
        }

    def _differs(self, noted: object, paths: Sequence[str]) -> bool:
        if not isinstance(noted, dict):
            return False
        return any(noted.get(path, mark) != mark for path, mark in self.marks(paths).items())

    def _weight(self, path: str) -> torch.Tensor:
        for name in (f"{path}.weight", f"{path}.base_layer.weight"):
            if name in self._state:
                tensor: torch.Tensor = self._state[name]
                return tensor
        return self.model.get_submodule(path).get_parameter("weight")


def keep_identity(model: nn.Module, paths: Iterable[str]) -> None:
    """Note on the model what tells it from others, before its weights are laid out over processes."""
    identity = BaseIdentity(model)
    identity.sample(paths)
    vars(model)[KEPT_DIGEST], vars(model)[KEPT] = digest_of_base(model), identity._heads


def _head(path: str, weight: torch.Tensor) -> bytes | None:
    if not weight.is_floating_point():
        return None
    head = weight.detach().reshape(-1)[:SAMPLE].to("cpu", torch.bfloat16).contiguous()
    return f"{path}{tuple(weight.shape)}".encode() + head.view(torch.int16).numpy().tobytes()


def write_base_record(folder: Path, model: nn.Module, paths: Iterable[str]) -> None:
    """Note the base of a plain adapter, whose PEFT files have no place for it. PEFT ignores this file."""
    paths = list(paths)
    base = BaseIdentity(model)
    name = getattr(model, "name_or_path", "") or ""
    write_json(folder / RECORD, base_record(name, base.sample(paths), base.marks(paths)))


def base_record(name: str, sample: str | None, marks: Mapping[str, str]) -> dict[str, object]:
    """The content of that file; without the sample of all linears together, those of single ones are compared."""
    return {
        "schema_version": 1,
        "base_name": name,
        "base_sample": sample,
        "base_sites": dict(marks),
    }
