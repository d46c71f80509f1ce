"""A published MixLoRA folder becomes an attached adapter, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loramux.core.adapter import Adapter
from loramux.core.bank import Rows
from loramux.core.types import Site
from loramux.formats.errors import OTHER_BASE, FormatError
from loramux.formats.mixlora_config import expert_setting
from loramux.formats.mixlora_tensors import MixLoraTensors
from loramux.formats.tensors import SiteTensors
from loramux.methods.mixlora import MixLoRAConfig, MixLoRAMethod, TokenRouter
from loramux.ops.contract import Spans

SAME_NAME = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "routing_strategy",
    "num_experts",
    "top_k",
    "top_p",
    "temperature",
    "expert_capacity",
    "sparse_step",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_init_range",
    "jitter_noise",
)
# `expert_lora` may differ from the whole in these two; the other fields it may name must agree.
OF_EXPERTS = {"r": "expert_r", "lora_alpha": "expert_alpha"}


def mixlora_adapter(
    sites: Sequence[Site],
    config: Mapping[str, Any],
    tensors: MixLoraTensors,
    name: str,
    activation: str | None = None,
) -> Adapter:
    """Check the tensors against the model's sites and stack the experts; routes as the published training code does.

    So the switch weighs an expert with p, as its weights were trained; capacity applies in training only.

    `activation` is the model's own: the experts run inside its FFN, so a file that names another is refused.
    """
    _check_settings(config, activation)
    own = MixLoRAConfig(
        **{key: config[key] for key in SAME_NAME if config.get(key) is not None},
        target_modules=(*tensors.attention, *tensors.ffn),
        aux_form="code",
        **{ours: expert_setting(config, theirs) for theirs, ours in OF_EXPERTS.items()},
        published_parity=config["routing_strategy"] != "mixlora",
    )
    experts = {**{path: [t] for path, t in tensors.attention.items()}, **tensors.ffn}
    found = _matching(sites, experts)
    method = MixLoRAMethod(own)
    chosen = list(found.values())
    method.check_sites(chosen)
    rows = {path: _rows(experts[path], method, site) for path, site in found.items()}
    routers = method.routers(chosen)
    layer_of = {site.block: site.layer for site in chosen}
    for block, router in routers.items():
        assert isinstance(router, TokenRouter)
        gate = tensors.gates.get(layer_of[block])
        if gate is None:
            raise FormatError(
                f"there is no moe_gate for layer {layer_of[block]}, but it has experts"
            )
        if gate.shape != router.weight.shape:
            raise FormatError(
                f"the moe_gate of layer {layer_of[block]} is {tuple(gate.shape)}, this model's FFN needs "
                f"{tuple(router.weight.shape)}; the mixture was trained on another base",
                code=OTHER_BASE,
            )
        router.weight = torch.nn.Parameter(gate.float().clone())
    return Adapter(name, method, found, rows, routers)


def _check_settings(config: Mapping[str, Any], activation: str | None) -> None:
    wanted = config.get("act_fn")
    if wanted is not None and activation is not None and wanted != activation:
        raise FormatError(
            f"the mixture's experts use act_fn {wanted!r}, the model's FFN uses {activation!r}; load it on a base with "
            "that activation"
        )
    for field in ("lora_dropout", "use_dora", "use_rslora"):
        if expert_setting(config, field) != config[field]:
            raise FormatError(
                f"expert_lora sets {field} to {expert_setting(config, field)!r} and the whole to {config[field]!r}; "
                "only r and lora_alpha may differ"
            )
    if config.get("ffn_dropout"):
        raise FormatError("ffn_dropout is not supported; set it to 0 in adapter_config.json")


def _matching(sites: Sequence[Site], experts: Mapping[str, list[SiteTensors]]) -> dict[str, Site]:
    by_path = {site.path: site for site in sites}
    for path, own in experts.items():
        site = by_path.get(path)
        if site is None or (own[0].d_in, own[0].d_out) != (site.d_in, site.d_out):
            raise FormatError(
                f"{path} ({own[0].d_in} -> {own[0].d_out}) is not a linear of this model; the mixture was trained on "
                "another base",
                code=OTHER_BASE,
            )
    return {site.path: site for site in sites if site.path in experts}


def _rows(experts: list[SiteTensors], method: MixLoRAMethod, site: Site) -> Rows:
    scales = [e.scale for e in method.experts(site)]
    if len(scales) != len(experts):
        raise FormatError(
            f"{site.path} has {len(experts)} experts, its config asks for {len(scales)}"
        )
    magnitudes = [e.magnitude for e in experts if e.magnitude is not None]
    return Rows(
        Spans.packed([e.rank for e in experts], scales),
        torch.cat([e.a for e in experts]),
        torch.cat([e.b for e in experts]).contiguous(),
        torch.stack(magnitudes) if magnitudes else None,
    )


def mixlora_tensors(adapter: Adapter, config: Mapping[str, Any]) -> MixLoraTensors:
    """The tensors of an attached MixLoRA in the published layout; `config` is what `mixlora_config` gives."""
    attention: dict[str, SiteTensors] = {}
    ffn: dict[str, list[SiteTensors]] = {}
    for path, rows in adapter.rows.items():
        entries = [
            SiteTensors(
                rows.a.detach()[rows.slot_rows(slot)],
                rows.b.detach()[rows.slot_rows(slot)],
                None if rows.magnitude is None else rows.magnitude.detach()[slot],
            )
            for slot in range(rows.spans.num_slots)
        ]
        if adapter.sites[path].kind == "ffn":
            ffn[path] = entries
        else:
            attention[path] = entries[0]
    layer_of = {site.block: site.layer for site in adapter.sites.values()}
    gates = {layer_of[b]: r.get_parameter("weight").detach() for b, r in adapter.routers.items()}
    return MixLoraTensors.build(config, attention, ffn, gates)


def mixlora_config(adapter: Adapter, base_name: str = "") -> dict[str, Any]:
    """adapter_config.json of the published layout for an attached MixLoRA."""
    own = adapter.method.config
    assert isinstance(own, MixLoRAConfig)
    _check_expressible(own)
    values = own.to_dict()
    targets = sorted({site.name.rpartition(".")[2] for site in adapter.sites.values()})
    return {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "base_model_name_or_path": base_name,
        "target_modules": targets,
        "act_fn": None,
        **{key: values[key] for key in SAME_NAME},
        "router_aux_loss_coef": _published_coefficient(own),
        "expert_lora": {
            theirs: values[ours] for theirs, ours in OF_EXPERTS.items() if values[ours] is not None
        },
    }


def _check_expressible(config: MixLoRAConfig) -> None:
    """The published layout has no field for our deviations: read back, the file would route otherwise."""
    strategy = config.routing_strategy
    parity = config.published_parity
    ours = None
    if strategy == "mixlora-switch" and not parity:
        ours = "mixlora-switch without published_parity=True (weight 1; the published one is p)"
    elif strategy == "mixlora-dynamic" and config.renormalise_top_p:
        ours = "renormalise_top_p=True"
    elif strategy == "mixlora-dynamic" and config.temperature > 0 and not parity:
        ours = (
            f"temperature={config.temperature} on logits (the published one divides probabilities)"
        )
    if ours is not None:
        raise ValueError(
            f"the published MixLoRA layout cannot say {ours}; save with layout='own', or train under the published rule"
        )


def _published_coefficient(config: MixLoRAConfig) -> float:
    """The coefficient that weighs the published form of the loss as this config's weighs its own."""
    assert config.router_aux_loss_coef is not None
    return config.router_aux_loss_coef / config.code_form_scale
