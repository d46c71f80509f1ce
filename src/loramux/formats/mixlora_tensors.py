"""The tensors of a MixLoRA adapter by module path: complete, as its config says, and under their current names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from loramux.formats.digest import tensor_digest
from loramux.formats.errors import FormatError, listed
from loramux.formats.mixlora_config import expert_setting
from loramux.formats.tensors import SiteTensors, check_shapes, natural_order

LAYERS = "model.layers"


@dataclass(frozen=True, eq=False)
class MixLoraTensors:
    """What a MixLoRA file holds, by module path of the model; layers in order, experts by index."""

    config: dict[str, Any]
    attention: dict[str, SiteTensors]
    ffn: dict[str, list[SiteTensors]]
    gates: dict[int, Tensor]  # layer -> [E, I]
    prefix: str = LAYERS

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the config and of every tensor under its current name; computed when first asked for."""
        return tensor_digest(self.config, mixlora_names(self, self.prefix))

    @classmethod
    def build(
        cls,
        config: Mapping[str, Any],
        attention: Mapping[str, SiteTensors],
        ffn: Mapping[str, list[SiteTensors]],
        gates: Mapping[int, Tensor],
        *,
        prefix: str = LAYERS,
    ) -> MixLoraTensors:
        """Order, and check completeness and shapes against the config."""
        found = cls(
            dict(config),
            {path: attention[path] for path in sorted(attention, key=natural_order)},
            {path: list(ffn[path]) for path in sorted(ffn, key=natural_order)},
            {layer: gates[layer] for layer in sorted(gates)},
            prefix,
        )
        check_mixlora(config, found, prefix)
        return found


def check_mixlora(config: Mapping[str, Any], tensors: MixLoraTensors, prefix: str) -> None:
    """Refuse tensors that are not what the config describes."""
    every = every_site(tensors)
    check_shapes(every, "MixLoRA")
    _check_ranks(config, tensors)
    _check_gates(config, tensors, prefix)
    _check_targets(config, tensors, prefix)
    missing = [
        name
        for name, site in every.items()
        if (site.magnitude is None) == _uses_dora(config, name in tensors.attention)
    ]
    if missing:
        raise FormatError(
            f"MixLoRA: use_dora and the magnitudes disagree for {listed(missing)}; the published writer does not save "
            "DoRA magnitudes, so what it trained is lost: save again with loramux",
            code="missing_tensor",
        )


def _check_ranks(config: Mapping[str, Any], tensors: MixLoraTensors) -> None:
    expert_rank = expert_setting(config, "r")
    wrong = [p for p, site in tensors.attention.items() if site.rank != config["r"]]
    wrong += [p for p, found in tensors.ffn.items() if any(s.rank != expert_rank for s in found)]
    if wrong:
        raise FormatError(
            f"MixLoRA: r is {config['r']} (experts {expert_rank}), the tensors of {listed(wrong)} have another rank",
            code="rank",
        )
    uneven = [p for p, found in tensors.ffn.items() if len({(s.d_in, s.d_out) for s in found}) != 1]
    if uneven:
        raise FormatError(f"MixLoRA: experts of {listed(uneven)} differ in shape", code="shape")


def _check_gates(config: Mapping[str, Any], tensors: MixLoraTensors, prefix: str) -> None:
    layers = {_layer_of(path, prefix) for path in tensors.ffn}
    if layers != tensors.gates.keys():
        odd = sorted(layers ^ tensors.gates.keys())
        raise FormatError(
            f"MixLoRA: layers {listed(odd)} have experts without a gate or a gate without experts",
            code="missing_tensor",
        )
    wrong = [
        layer
        for layer, gate in tensors.gates.items()
        if gate.dim() != 2 or gate.shape[0] != config["num_experts"]
    ]
    if wrong:
        raise FormatError(
            f"MixLoRA: gates of layers {listed(wrong)} are not [{config['num_experts']}, width]",
            code="shape",
        )


def _check_targets(config: Mapping[str, Any], tensors: MixLoraTensors, prefix: str) -> None:
    """Tensors and target_modules name the same linears; a linear adapted in one layer is adapted in all its like."""
    wanted = set(config["target_modules"])
    by_name: dict[str, set[int]] = {}
    for path in (*tensors.attention, *tensors.ffn):
        by_name.setdefault(path.rpartition(".")[2], set()).add(_layer_of(path, prefix))
    if by_name.keys() != wanted:
        raise FormatError(
            f"MixLoRA: target_modules and the tensors disagree about {listed(sorted(wanted ^ by_name.keys()))}",
            code="missing_tensor" if wanted - by_name.keys() else "unexpected_tensor",
        )
    # Attention is adapted in every layer; experts may sit in every n-th only (sparse_step).
    every_layer = set(range(1 + max(max(layers) for layers in by_name.values())))
    for kind, layers in ((tensors.attention, every_layer), (tensors.ffn, set(tensors.gates))):
        names = {path.rpartition(".")[2] for path in kind}
        holes = [
            f"{name} in layer {layer}"
            for name in sorted(names)
            for layer in sorted(layers - by_name[name])
        ]
        if holes:
            raise FormatError(f"MixLoRA: no tensors for {listed(holes)}", code="missing_tensor")


def _uses_dora(config: Mapping[str, Any], attention: bool) -> bool:
    return bool(config["use_dora"] if attention else expert_setting(config, "use_dora"))


def every_site(tensors: MixLoraTensors) -> dict[str, SiteTensors]:
    """All sites by path; those of experts end in `.experts.INDEX`."""
    return dict(tensors.attention) | {
        f"{path}.experts.{e}": site
        for path, found in tensors.ffn.items()
        for e, site in enumerate(found)
    }


def mixlora_names(tensors: MixLoraTensors, prefix: str) -> dict[str, Tensor]:
    """Every tensor under its current name and in the file's shape."""
    named = {f"mixlora.layers.{layer}.mlp.moe_gate.weight": g for layer, g in tensors.gates.items()}
    for path, site in every_site(tensors).items():
        key = f"mixlora.layers{path.removeprefix(prefix)}"
        named[f"{key}.lora_A.weight"] = site.a
        named[f"{key}.lora_B.weight"] = site.b.t()
        if site.magnitude is not None:
            named[f"{key}.lora_magnitude_vector.weight"] = site.magnitude
    return named


def _layer_of(path: str, prefix: str) -> int:
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(?:self_attn|mlp)\.\w+", path)
    if match is None:
        raise FormatError(
            f"MixLoRA files have no place for {path!r}: they hold {prefix}.LAYER.self_attn.* and "
            f"{prefix}.LAYER.mlp.* of Llama-like models; save a mixture instead",
            code="unsupported",
        )
    return int(match[1])
