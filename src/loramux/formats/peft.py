"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, read and written bit-exactly.

All or nothing: whatever PEFT would ignore with a warning (tensors nobody uses, features that are off here, unknown
keys) is refused before anything else happens. PEFT itself is not imported, and torch only to read or write tensors:
`collect_sites` and `check_sites` judge `raw.RawTensor` as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.formats.errors import FormatError, listed
from loramux.formats.fields import check_config
from loramux.formats.jsonio import read_json_object, write_json
from loramux.formats.patterns import MAX_PATH, MODULE_PATH, target_test
from loramux.formats.scaling import peft_config, rank_and_scale, site_scaling
from loramux.formats.tensors import (
    AdapterTensors,
    SiteTensors,
    check_shapes,
    named_tensors,
    refuse_no_op,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["peft_config", "rank_and_scale", "read_peft", "site_scaling", "write_peft"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
MIXTURE_NAME = "mixture_config.json"
PREFIX = "base_model.model."

_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_UNSUPPORTED = (
    ("lora_embedding_", "LoRA on embeddings is not supported; re-train without embedding layers in target_modules"),
    (".lora_B.bias", "a bias on B is not supported; re-train with lora_bias=false"),
    (".modules_to_save.", "whole trained modules are not supported; re-train without modules_to_save"),
    ("embed_tokens", "saved embeddings are not supported; save with save_embedding_layers=False"),
    ("lm_head", "a saved output head is not supported; save with save_embedding_layers=False"),
)  # fmt: skip


def read_peft(folder: str | os.PathLike[str], *, allow_zero: bool = False) -> AdapterTensors:
    """Read and check one adapter folder; raises FormatError. `allow_zero` accepts an untrained adapter (to resume it).

    Not checked here: whether a model has these modules, and whether it is the base the adapter was trained on.
    """
    from loramux.formats.storage import read_tensors

    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    _check_files(folder)
    config = read_json_object(config_path)
    check_config(config, str(config_path))
    sites = collect_sites(read_tensors(weights_path), str(weights_path))
    check_sites(config, sites, str(folder))
    if not allow_zero:
        refuse_no_op(sites, str(folder))
    return AdapterTensors.build(config, sites)


def write_peft(folder: str | os.PathLike[str], adapter: AdapterTensors) -> None:
    """Write an adapter that `read_peft` and PEFT accept; each file is replaced in one step, the config last."""
    from loramux.formats.storage import check_finite, write_tensors

    folder = Path(folder)
    check_config(adapter.config, "the config to write")
    check_sites(adapter.config, adapter.sites, "the adapter to write")
    if (folder / MIXTURE_NAME).exists():
        raise FormatError(
            f"{folder} holds a mixture; choose another folder for this adapter", code="not_ours"
        )
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in named_tensors(adapter.sites).items()}
    check_finite(tensors, "the adapter to write")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, tensors)
    write_json(folder / CONFIG_NAME, adapter.config)


def refuse_pickle(path: Path, wanted: str) -> FormatError:
    """The error for a pickled file, with a command that converts it elsewhere."""
    command = (
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.clone() for k, v in torch.load('{path.name}', map_location='cpu', "
        f"weights_only=True).items()}}, '{wanted}')\""
    )
    return FormatError(
        f"{path} is a pickle, which can run code when opened; loramux never opens one. If you trust its author, "
        "convert it once, offline, in a throw-away environment with torch and safetensors, inside that folder:\n"
        f"  {command}\n"
        "or save it again there with PEFT (save_pretrained(..., safe_serialization=True)), then load the folder with "
        f"{wanted}",
        code="pickle",
    )


def collect_sites(tensors: Mapping[str, Tensor], where: str) -> dict[str, SiteTensors]:
    """Group the file's tensors by module; every tensor must be one we use, and A and B must come in pairs."""
    parts: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for name, tensor in tensors.items():
        path, part = _split(name)
        if part is None or part in parts.setdefault(path, {}):
            unexpected.append(name)
        else:
            parts[path][part] = tensor
    if unexpected:
        reason = next((why for mark, why in _UNSUPPORTED for n in unexpected if mark in n), None)
        raise FormatError(
            f"{where} holds unexpected tensors {listed(unexpected)}: "
            + (reason or f"names must be {PREFIX}MODULE.lora_A.weight or .lora_B.weight"),
            code="unsupported" if reason else "unexpected_tensor",
        )
    lonely = [path for path, found in parts.items() if not {"a", "b"} <= found.keys()]
    if lonely:
        lacking = [f"{p}.lora_{'B' if 'a' in parts[p] else 'A'}.weight" for p in lonely]
        raise FormatError(
            f"{where} lacks {listed(lacking)}; save the adapter again", code="missing_tensor"
        )
    return {
        path: SiteTensors(found["a"], _transposed(found["b"]), found.get("magnitude"))
        for path, found in parts.items()
    }


def check_sites(config: Mapping[str, Any], sites: Mapping[str, SiteTensors], where: str) -> None:
    """Shapes, ranks against the config, magnitudes against use_dora, modules against target_modules."""
    check_shapes(sites, where)
    is_target = target_test(config)
    stray = [path for path in sites if not is_target(path)]
    if stray:
        raise FormatError(
            f"{where}: there are tensors for {listed(stray)}, which target_modules does not cover; "
            "PEFT would drop them silently. Correct target_modules",
            code="unexpected_tensor",
        )
    dora = bool(config.get("use_dora"))
    wrong = [path for path, site in sites.items() if (site.magnitude is not None) != dora]
    if wrong:
        raise FormatError(
            f"{where}: use_dora is {str(dora).lower()}, but lora_magnitude_vector is "
            f"{'missing' if dora else 'there'} for {listed(wrong)}",
            code="missing_tensor" if dora else "unexpected_tensor",
        )
    site_scaling(config, {path: site.rank for path, site in sites.items()}, where)


def _split(name: str) -> tuple[str, str | None]:
    """(module path, part) of a tensor name; part is None where the name is not one of ours."""
    if name.startswith(PREFIX) and len(name) <= MAX_PATH:
        for ending, part in _PARTS.items():
            path = name[len(PREFIX) : -len(ending)]
            if name.endswith(ending) and MODULE_PATH.fullmatch(path):
                return path, part
    return "", None


def _transposed(b: Tensor) -> Tensor:
    return b.t() if b.dim() == 2 else b


def _check_files(folder: Path) -> None:
    if (folder / MIXTURE_NAME).exists():
        raise FormatError(
            f"{folder} is a mixture, not a single adapter; read it as a mixture, or one of its experts/ folders",
            code="mixture",
        )
    for name, meaning in ((CONFIG_NAME, "its config"), (WEIGHTS_NAME, "its tensors")):
        if not os.path.lexists(folder / name):
            if name == WEIGHTS_NAME and os.path.lexists(folder / PICKLED_NAME):
                raise refuse_pickle(folder / PICKLED_NAME, WEIGHTS_NAME)
            raise FormatError(
                f"{folder} is not a PEFT adapter: {name} ({meaning}) is missing; give the folder that "
                "save_pretrained wrote",
                code="missing_file",
            )
