"""The published MixLoRA layouts: current and legacy keys are read, the current ones written. Safetensors only.

    current  mixlora.layers.L.mlp.moe_gate.weight                        [E, I]
             mixlora.layers.L.self_attn.q_proj.lora_A.weight             [R, I]   lora_B [O, R]
             mixlora.layers.L.mlp.gate_proj.experts.E.lora_A.weight      [R, I]   lora_B [O, R]
    legacy   mixlora.layers.L.gate.weight
             mixlora.layers.L.experts.E.w1_proj.lora_A.weight            w1 gate, w2 down, w3 up

The published writer keeps no DoRA magnitudes; ours adds `...lora_magnitude_vector.weight` [O].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loramux.formats.errors import FormatError, listed
from loramux.formats.jsonio import read_json_object, write_json
from loramux.formats.mixlora_config import LEGACY_PROJECTIONS, normal_config
from loramux.formats.mixlora_tensors import (
    LAYERS,
    MixLoraTensors,
    check_mixlora,
    every_site,
    mixlora_names,
)
from loramux.formats.peft import refuse_pickle
from loramux.formats.storage import check_finite, read_tensors, write_tensors
from loramux.formats.tensors import SiteTensors, refuse_no_op

NAMES = (  # config, tensors, pickled tensors: current, then the oldest
    ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    ("mixlora_config.json", "mixlora_model.safetensors", "mixlora_model.bin"),
)

_PART = r"(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector\.weight)"
_LAYER = r"mixlora\.layers\.(?P<layer>0|[1-9]\d{0,5})"
_EXPERT = r"experts\.(?P<expert>0|[1-9]\d{0,5})"
_GATES = re.compile(rf"{_LAYER}\.(?:mlp\.moe_gate|gate)\.weight")
_ATTENTION = re.compile(rf"{_LAYER}\.self_attn\.(?P<proj>\w+)\.{_PART}")
_FFN = re.compile(rf"{_LAYER}\.mlp\.(?P<proj>\w+)\.{_EXPERT}\.{_PART}")
_FFN_LEGACY = re.compile(rf"{_LAYER}\.{_EXPERT}\.(?P<proj>\w+)\.{_PART}")


def read_mixlora(
    folder: str | os.PathLike[str], *, prefix: str = LAYERS, allow_zero: bool = False
) -> tuple[dict[str, Any], MixLoraTensors]:
    """(config under current names with defaults filled in, tensors); `prefix` is where the model keeps its layers."""
    folder = Path(folder)
    config_path, weights_path = _find(folder)
    config = normal_config(read_json_object(config_path), str(config_path))
    tensors = _group(config, read_tensors(weights_path), str(weights_path), prefix)
    if not allow_zero:
        refuse_no_op(every_site(tensors), str(folder))
    return config, tensors


def write_mixlora(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: MixLoraTensors,
    *,
    prefix: str = LAYERS,
) -> None:
    """Write the current layout; also what the published writer leaves out, so that training can be resumed."""
    folder = Path(folder)
    ready = normal_config(
        {"peft_type": "MIXLORA", **config}, "the MixLoRA config to write", warns=False
    )
    check_mixlora(ready, tensors, prefix)
    named = mixlora_names(tensors, prefix)
    check_finite(named, "the MixLoRA tensors to write")
    folder.mkdir(parents=True, exist_ok=True)
    config_name, weights_name, _ = NAMES[0]
    write_tensors(folder / weights_name, named)
    written = {key: value for key, value in ready.items() if key != "expert_lora" or value}
    write_json(folder / config_name, written)


def _find(folder: Path) -> tuple[Path, Path]:
    for config_name, weights_name, pickled_name in NAMES:
        if not os.path.lexists(folder / config_name):
            continue
        if os.path.lexists(folder / weights_name):
            return folder / config_name, folder / weights_name
        if os.path.lexists(folder / pickled_name):
            raise refuse_pickle(folder / pickled_name, weights_name)
        raise FormatError(f"{folder} lacks {weights_name}", code="missing_file")
    raise FormatError(
        f"{folder} is not a MixLoRA folder: {NAMES[0][0]} is missing", code="missing_file"
    )


_Parts = dict[str, Tensor]


def _group(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, prefix: str
) -> MixLoraTensors:
    gates: dict[int, Tensor] = {}
    attention: dict[str, _Parts] = {}
    ffn: dict[str, dict[int, _Parts]] = {}
    unexpected = []
    for name, tensor in tensors.items():
        slot, key = _slot(name, prefix, gates, attention, ffn)
        if slot is None or key in slot:
            unexpected.append(name)
        else:
            slot[key] = tensor
    if unexpected:
        raise FormatError(
            f"{where} holds unexpected tensors {listed(unexpected)}; a trained 'classifier' head and anything else "
            "outside attention, experts and gates is not supported (a key may also be there twice, under its current "
            "and its legacy name)",
            code="unexpected_tensor",
        )
    experts = {path: _in_order(path, found, config, where) for path, found in ffn.items()}
    return MixLoraTensors.build(
        config,
        {path: _site(path, parts, where) for path, parts in attention.items()},
        {
            path: [_site(f"{path}, expert {e}", p, where) for e, p in enumerate(found)]
            for path, found in experts.items()
        },
        gates,
        prefix=prefix,
    )


def _slot(
    name: str,
    prefix: str,
    gates: dict[int, Tensor],
    attention: dict[str, _Parts],
    ffn: dict[str, dict[int, _Parts]],
) -> tuple[dict[Any, Tensor] | None, Any]:
    """The dictionary and key a tensor belongs under; (None, None) where the name is none of ours."""
    if match := _GATES.fullmatch(name):
        return gates, int(match["layer"])
    if match := _ATTENTION.fullmatch(name):
        path = f"{prefix}.{match['layer']}.self_attn.{match['proj']}"
        return attention.setdefault(path, {}), match["part"]
    if match := _FFN.fullmatch(name) or _FFN_LEGACY.fullmatch(name):
        proj = LEGACY_PROJECTIONS.get(match["proj"], match["proj"])
        experts = ffn.setdefault(f"{prefix}.{match['layer']}.mlp.{proj}", {})
        return experts.setdefault(int(match["expert"]), {}), match["part"]
    return None, None


def _site(what: str, parts: _Parts, where: str) -> SiteTensors:
    if not {"lora_A.weight", "lora_B.weight"} <= parts.keys():
        raise FormatError(
            f"{where}: lora_A or lora_B of {what!r} is missing", code="missing_tensor"
        )
    b = parts["lora_B.weight"]
    magnitude = parts.get("lora_magnitude_vector.weight")
    return SiteTensors(parts["lora_A.weight"], b.t() if b.dim() == 2 else b, magnitude)


def _in_order(
    path: str, found: dict[int, _Parts], config: Mapping[str, Any], where: str
) -> list[_Parts]:
    wanted = range(config["num_experts"])
    if sorted(found) != list(wanted):
        raise FormatError(
            f"{where}: {path} has experts {listed(sorted(found), 10)}, num_experts is {len(wanted)}",
            code="missing_tensor",
        )
    return [found[expert] for expert in wanted]
