"""What uploads are checked against: the linears of a base, its digest, and how large its weights are.

Why from headers: a registry must know what fits its base without loading it. Families whose files name their modules
are read directly; of others the model is built without memory (torch's meta device) to learn its modules.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from loramux.formats.digest import base_digest, cache_folder, checkpoint_files
from loramux.formats.errors import FormatError
from loramux.formats.files import write_bytes
from loramux.formats.jsonio import canonical_json, read_json_object
from loramux.formats.raw import EXPONENT, RawTensor, map_tensors

if TYPE_CHECKING:
    from torch import nn

    from loramux.core.types import Site

PIECE = 2**16  # stays in a processor's cache
SAMPLE = 32  # entries of a weight that `persist.base` notes beside an adapter
SCHEMA_VERSION = 1

# model_type -> (prefix of a headless checkpoint's modules, whether its linears are Conv1D: kept as [in, out])
FAMILIES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "llama": ("model.", False),
        "mistral": ("model.", False),
        "qwen2": ("model.", False),
        "qwen3": ("model.", False),
        "gemma": ("model.", False),
        "gemma2": ("model.", False),
        "gemma3_text": ("model.", False),
        "phi3": ("model.", False),
        "gpt2": ("transformer.", True),
    }
)
_LINEAR = re.compile(r"(?P<path>(?:[a-z_]+\.)*?(?:layers|h)\.\d+\.[A-Za-z0-9_.]+)\.weight")


@dataclass(frozen=True)
class BaseShape:
    """A base as uploads see it. `norms`: Frobenius norm of each weight; `heads`: hex of its shape and first entries."""

    digest: str
    name: str
    linears: Mapping[str, tuple[int, int]]  # module path -> (d_in, d_out), decoder layers only
    norms: Mapping[str, float] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "digest": self.digest,
            "name": self.name,
            "linears": {path: list(shape) for path, shape in self.linears.items()},
            "norms": dict(self.norms),
            "heads": dict(self.heads),
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseShape:
        """What `to_json` gave; refuses another version."""
        if value.get("schema_version") != SCHEMA_VERSION:
            raise FormatError(
                f"a base's shape of version {value.get('schema_version')!r}, this loramux reads {SCHEMA_VERSION}; "
                "make it again from the checkpoint",
                code="version",
            )
        linears = {path: (int(i), int(o)) for path, (i, o) in value["linears"].items()}
        rest = {key: dict(value[key]) for key in ("norms", "heads", "config")}
        return cls(str(value["digest"]), str(value["name"]), linears, **rest)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The base's sites as methods see them; builds the model on torch's meta device, once."""
        from loramux.core.sites import find_sites

        return tuple(find_sites(meta_model(self.config)))


def base_shape(folder: str | Path) -> BaseShape:
    """Read a checkpoint folder: headers for the linears, every weight once for norms and digest; then remembered."""
    folder = Path(folder)
    digest, name = base_digest(folder), folder.resolve().name
    memory = cache_folder() / f"shape-{digest}.json"
    known = _recall(memory)
    if known is not None:
        return replace(known, name=name)
    shape = _read_shape(folder, digest, name)
    with contextlib.suppress(OSError):  # a read-only home costs time, not correctness
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(memory, canonical_json(shape.to_json()))
    return shape


def _recall(memory: Path) -> BaseShape | None:
    try:
        known = BaseShape.from_json(json.loads(memory.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return known if memory.stem.endswith(known.digest) else None


def _read_shape(folder: Path, digest: str, name: str) -> BaseShape:
    config = read_json_object(folder / "config.json")
    weights = {
        name: tensor
        for path in checkpoint_files(folder)
        for name, tensor in map_tensors(path).items()
    }
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        found = _linears(weights, *family)
    else:
        found = _linears_of_model(meta_model(config), weights)
    if not found:
        raise FormatError(
            f"{folder.name} holds no linears of decoder layers; give the folder of a decoder-only model",
            code="missing_tensor",
        )
    shape = {path: _in_out(weight, is_conv) for path, (weight, is_conv) in found.items()}
    floats = {path: weight for path, (weight, _) in found.items() if weight.dtype in EXPONENT}
    return BaseShape(
        digest,
        name,
        shape,
        {path: norm(weight) for path, weight in floats.items()},
        {path: head(path, weight) for path, weight in floats.items()},
        config,
    )


def shape_of_model(model: nn.Module, digest: str, name: str = "") -> BaseShape:
    """The same for a model in memory, without norms and heads."""
    from loramux.core.sites import find_sites

    linears = {site.path: (site.d_in, site.d_out) for site in find_sites(model)}
    config: Any = getattr(model, "config", None)
    return BaseShape(digest, name, linears, config=config.to_dict() if config is not None else {})


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that a config.json describes, without memory for its weights; no code of the checkpoint runs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    try:
        own = AutoConfig.for_model(str(config.get("model_type")), **given)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(own)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"transformers cannot build a base of model_type {config.get('model_type')!r:.80}: {error}",
            code="unsupported",
        ) from None
    return model


def norm(weight: RawTensor) -> float:
    """Frobenius norm: pieces in fp32, their sum in double precision."""
    rows = weight.bits.reshape(-1)
    total = 0.0
    for at in range(0, rows.size, PIECE):
        part = RawTensor(weight.dtype, rows[at : at + PIECE]).floats()
        total += float(np.dot(part, part))
    return float(total**0.5)


def head(path: str, weight: RawTensor) -> str:
    """Hex of what `persist.base` samples of a weight: path, shape and the first entries in bf16."""
    flat = RawTensor(weight.dtype, weight.bits.reshape(-1)[:SAMPLE])
    if weight.dtype == "bfloat16":
        bits = np.ascontiguousarray(flat.bits)
    else:
        wide = flat.floats().view(np.uint32).astype(np.uint64)
        # To the nearest bf16, ties to even, as torch casts.
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return (f"{path}{weight.shape}".encode() + bits.tobytes()).hex()


def _linears(
    weights: Mapping[str, RawTensor], prefix: str, is_conv: bool
) -> dict[str, tuple[RawTensor, bool]]:
    bare = not any(name.startswith(prefix) for name in weights)
    found = {}
    for name, weight in weights.items():
        match = _LINEAR.fullmatch(name)
        if match is not None and weight.dim() == 2:
            found[(prefix if bare else "") + match["path"]] = (weight, is_conv)
    return found


def _linears_of_model(
    model: nn.Module, weights: Mapping[str, RawTensor]
) -> dict[str, tuple[RawTensor, bool]]:
    from loramux.core.sites import find_sites

    sites = find_sites(model)
    absent = [site.path for site in sites if f"{site.path}.weight" not in weights]
    if absent:
        raise FormatError(
            f"the checkpoint names its weights otherwise than transformers its modules ({absent[0]} is not there); "
            "save it once with save_pretrained from this transformers",
            code="missing_tensor",
        )
    return {site.path: (weights[f"{site.path}.weight"], site.transposed) for site in sites}


def _in_out(weight: RawTensor, is_conv: bool) -> tuple[int, int]:
    rows, columns = weight.shape
    return (rows, columns) if is_conv else (columns, rows)
