"""LoRAMoE and MoLA in MoE-PEFT's layout: experts and a gate at every linear. Safetensors only.

    mola.layers.L.self_attn.q_proj.moe_gate.weight                [E, I]
    mola.layers.L.self_attn.q_proj.experts.E.lora_A.weight        [R, I]   lora_B [O, R]
    loramoe.layers.L.mlp.up_proj.moe_gate.weight, .experts.E...   the same, in the FFN
    loramoe.layers.L.self_attn.q_proj.lora_A.weight               [R, I]   one plain LoRA without a gate

All linears have the same number of experts there, and no DoRA.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loramux.formats.errors import FormatError, listed
from loramux.formats.fields import is_alpha, is_rank, is_whole
from loramux.formats.jsonio import check_keys, read_json_object, write_json
from loramux.formats.peft import refuse_pickle
from loramux.formats.storage import check_finite, read_tensors, write_tensors
from loramux.formats.tensors import SiteTensors, check_shapes, natural_order, refuse_no_op

KINDS = {"LORAMOE": "loramoe", "MOLA": "mola"}
CONFIG, WEIGHTS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
LAYERS = "model.layers"
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules", "num_experts")
DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.0,
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "top_k": 2,
    "router_aux_loss_coef": 0.001,
}
LABELS = (
    "task_type",
    "base_model_name_or_path",
    "routing_strategy",
    "lora_init",
    "router_init_range",
    "router_loss",
)
_NAME = re.compile(
    r"(?P<kind>loramoe|mola)\.layers\.(?P<path>(?:0|[1-9]\d{0,5})\.(?:self_attn|mlp)\.\w+)\."
    r"(?:(?P<gate>moe_gate\.weight)|(?:experts\.(?P<expert>0|[1-9]\d{0,5})\.)?lora_(?P<part>[AB])\.weight)"
)


@dataclass(frozen=True, eq=False)
class GatedTensors:
    """By module path of the model: experts in order, and the gate [E, I] of linears that have one."""

    config: dict[str, Any]
    experts: dict[str, list[SiteTensors]]
    gates: dict[str, Tensor]


def read_moe_peft(folder: str | os.PathLike[str], *, allow_zero: bool = False) -> GatedTensors:
    """A folder that MoE-PEFT trained, once its weights are safetensors; every tensor is used or it is refused."""
    folder = Path(folder)
    if not os.path.lexists(folder / WEIGHTS) and os.path.lexists(folder / PICKLED):
        raise refuse_pickle(folder / PICKLED, WEIGHTS)
    where = str(folder / CONFIG)
    config = normal_config(read_json_object(folder / CONFIG), where)
    found = _group(config, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    check_gated(found, str(folder))
    if not allow_zero:
        refuse_no_op(_every(found), str(folder))
    return found


def write_moe_peft(folder: str | os.PathLike[str], tensors: GatedTensors) -> None:
    """The same layout from an attached adapter."""
    folder = Path(folder)
    config = normal_config(tensors.config, "the config to write")
    check_gated(tensors, "the tensors to write")
    prefix = KINDS[config["peft_type"]]
    named = {}
    for path, experts in tensors.experts.items():
        key = f"{prefix}.layers{path.removeprefix(LAYERS)}"
        gate = tensors.gates.get(path)
        if gate is not None:
            named[f"{key}.moe_gate.weight"] = gate
        for e, site in enumerate(experts):
            own = key if gate is None else f"{key}.experts.{e}"
            named[f"{own}.lora_A.weight"] = site.a
            named[f"{own}.lora_B.weight"] = site.b.t()
    check_finite(named, "the tensors to write")
    strange = [name for name in named if not _NAME.fullmatch(name)]
    if strange:
        raise FormatError(
            f"MoE-PEFT's files have no place for {listed(strange)}: they hold {LAYERS}.LAYER.self_attn.* and .mlp.* of "
            "Llama-like models; save a mixture instead",
            code="unsupported",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, named)
    write_json(folder / CONFIG, config)


def normal_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked, with defaults filled in; null counts as not said."""
    given = {key: value for key, value in config.items() if value is not None}
    if given.get("peft_type") not in KINDS:
        raise FormatError(
            f"{where}: peft_type is {given.get('peft_type')!r}, expected one of {', '.join(KINDS)}",
            code="peft_type",
        )
    check_keys(given, frozenset({*REQUIRED, *DEFAULTS, *LABELS}), where)
    missing = [key for key in REQUIRED if key not in given]
    if missing:
        raise FormatError(f"{where} lacks {listed(missing)}", code="bad_value")
    result = {**DEFAULTS, **given, "target_modules": _targets(given["target_modules"], where)}
    for key, test in (
        ("r", is_rank),
        ("lora_alpha", lambda v: is_alpha(v) and v > 0),
        ("num_experts", lambda v: is_whole(v) and 0 < v <= 4096),
        ("top_k", lambda v: is_whole(v) and 0 < v <= result["num_experts"]),
        ("use_rslora", lambda v: isinstance(v, bool)),
        ("lora_dropout", lambda v: type(v) in (int, float) and 0 <= v < 1),
        ("router_aux_loss_coef", lambda v: type(v) in (int, float) and v >= 0),
    ):
        # LoRAMoE chooses no experts: a top_k that is not said there may be larger than their number.
        idle = key == "top_k" and result["peft_type"] == "LORAMOE" and key not in given
        if not idle and not test(result[key]):  # type: ignore[operator]
            raise FormatError(f"{where}: {key} is {result[key]!r:.200}", code="bad_value")
    for key, only in (("bias", "none"), ("use_dora", False)):
        if result[key] != only:
            raise FormatError(
                f"{where}: {key} is {result[key]!r}, only {only!r} is supported",
                code="unsupported",
            )
    routing = KINDS[result["peft_type"]]
    if result.get("routing_strategy", routing) != routing:
        raise FormatError(
            f"{where}: peft_type is {result['peft_type']!r}, but routing_strategy {result['routing_strategy']!r:.100}; "
            f"expected {routing!r}",
            code="bad_value",
        )
    if result["peft_type"] == "LORAMOE":
        for key in ("top_k", "router_aux_loss_coef"):
            result.pop(key)
    return dict(sorted(result.items()))


def check_gated(tensors: GatedTensors, where: str) -> None:
    """Ranks, numbers of experts, gates and targets are what the config says."""
    config = tensors.config
    check_shapes(_every(tensors), where)
    names = {path.rpartition(".")[2] for path in tensors.experts}
    if names != set(config["target_modules"]):
        odd = sorted(names ^ set(config["target_modules"]))
        raise FormatError(
            f"{where}: target_modules and the tensors disagree about {listed(odd)}",
            code="missing_tensor",
        )
    for path, experts in tensors.experts.items():
        gate = tensors.gates.get(path)
        plain_allowed = config["peft_type"] == "LORAMOE" and ".self_attn." in path
        wanted = 1 if gate is None else config["num_experts"]
        if len(experts) != wanted or (gate is None and not plain_allowed):
            raise FormatError(
                f"{where}: {path} has {len(experts)} experts and {'no' if gate is None else 'a'} gate, num_experts is "
                f"{config['num_experts']}",
                code="missing_tensor",
            )
        if any(site.rank != config["r"] for site in experts):
            raise FormatError(f"{where}: {path} has another rank than r={config['r']}", code="rank")
        if gate is not None and tuple(gate.shape) != (wanted, experts[0].d_in):
            raise FormatError(
                f"{where}: the gate of {path} is {tuple(gate.shape)}, expected {(wanted, experts[0].d_in)}",
                code="shape",
            )


def _targets(value: object, where: str) -> list[str]:
    if isinstance(value, dict) and all(isinstance(on, bool) for on in value.values()):
        value = [name for name, on in value.items() if on]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise FormatError(f"{where}: target_modules is not a list of names", code="bad_value")
    return sorted({str(name) for name in value})


def _group(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> GatedTensors:
    gates: dict[str, Tensor] = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    plain: set[str] = set()
    unexpected = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["kind"] != KINDS[config["peft_type"]]:
            unexpected.append(name)
            continue
        path = f"{LAYERS}.{match['path']}"
        if match["gate"]:
            gates[path] = tensor
            continue
        if match["expert"] is None:
            plain.add(path)
        parts.setdefault(path, {}).setdefault(int(match["expert"] or 0), {})[match["part"]] = tensor
    mixed = sorted(plain & gates.keys())
    if unexpected or mixed:
        raise FormatError(
            f"{where} holds unexpected tensors {listed(unexpected or mixed)}",
            code="unexpected_tensor",
        )
    experts = {
        path: _in_order(path, parts[path], where) for path in sorted(parts, key=natural_order)
    }
    alone = sorted(gates.keys() - experts.keys())
    if alone:
        raise FormatError(f"{where}: {listed(alone)} have no experts", code="missing_tensor")
    return GatedTensors(
        dict(config), experts, {path: gates[path] for path in experts if path in gates}
    )


def _in_order(path: str, found: dict[int, dict[str, Tensor]], where: str) -> list[SiteTensors]:
    halves = [e for e, own in found.items() if own.keys() != {"A", "B"}]
    if halves or sorted(found) != list(range(len(found))):
        raise FormatError(
            f"{where}: {path} lacks lora_A or lora_B of some of its experts {listed(sorted(found), 10)}",
            code="missing_tensor",
        )
    return [SiteTensors(found[e]["A"], found[e]["B"].t()) for e in sorted(found)]


def _every(tensors: GatedTensors) -> dict[str, SiteTensors]:
    return {
        f"{path}.experts.{e}": site
        for path, experts in tensors.experts.items()
        for e, site in enumerate(experts)
    }
