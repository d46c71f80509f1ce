"""Writes an attached adapter: the servability class decides the layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from loramux.core.adapter import Adapter
from loramux.core.method import MethodConfig
from loramux.formats.errors import FormatError
from loramux.formats.mixlora import write_mixlora
from loramux.formats.mixture import write_mixture
from loramux.formats.peft import peft_config, write_peft
from loramux.formats.scaling import site_scaling, target_names, uneven
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.persist.base import digest_of_base, write_base_record
from loramux.persist.names import RANKS, expert_name, slot_order
from loramux.persist.published import mixlora_config, mixlora_tensors
from loramux.persist.routers import router_tensors
from loramux.persist.rows import joined_row_tensors, row_tensors


def write_adapter(model: nn.Module, adapter: Adapter, folder: Path) -> Path:
    """Save rows, routers and config; the servability class decides the layout."""
    experts = expert_tensors(model, adapter)
    method = adapter.method
    if method.servability == "static":
        (tensors,) = experts.values()
        write_peft(folder, tensors)
        write_base_record(folder, model, tensors.sites)
        return folder
    config = method.config.to_dict()
    if adapter.experts:
        config["adapters"] = list(
            adapter.experts
        )  # by name: the paths they came from mean nothing elsewhere
    write_mixture(
        folder,
        method=method.name,
        config=config,
        servability=method.servability,
        base_digest=digest_of_base(model),
        base_name=getattr(model, "name_or_path", "") or "",
        experts=experts,
        router=router_tensors(adapter),
    )
    return folder


def write_published_mixlora(model: nn.Module, adapter: Adapter, folder: Path) -> Path:
    """Save a MixLoRA in the published layout (safetensors). Only for models whose layers are `model.layers`."""
    if adapter.method.name != "mixlora":
        raise ValueError(f"{adapter.name!r} is a {adapter.method.title}; the layout is for MixLoRA")
    config = mixlora_config(adapter, getattr(model, "name_or_path", "") or "")
    write_mixlora(folder, config, mixlora_tensors(adapter, config))
    return folder


def expert_tensors(model: nn.Module, adapter: Adapter) -> dict[str, AdapterTensors]:
    """Every expert as an adapter of its own, by name."""
    most = max(rows.spans.num_slots for rows in adapter.rows.values())
    is_one = adapter.method.folder_layout == "one"
    parts: dict[str, dict[str, tuple[SiteTensors, float]]] = {}
    for path, rows in adapter.rows.items():
        num = rows.spans.num_slots
        entries = [joined_row_tensors(rows, path)] if is_one else row_tensors(rows)
        for slot, entry in enumerate(entries):
            if entry is not None:
                key = RANKS if is_one else expert_name(adapter, slot, num, most)
                parts.setdefault(key, {})[path] = entry
    order = [name for name in (adapter.experts or sorted(parts, key=slot_order)) if name in parts]
    return {name: _one_expert(model, adapter, name, parts[name]) for name in order}


def _one_expert(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    entries: Mapping[str, tuple[SiteTensors, float]],
) -> AdapterTensors:
    sites = {path: entry for path, (entry, _) in entries.items()}
    ranks = {path: entry.rank for path, entry in sites.items()}
    scales = {path: scale for path, (_, scale) in entries.items()}
    saved = adapter.saved_configs.get(name)
    if saved is not None and _still_says(saved, ranks, scales):
        return AdapterTensors.build(saved, sites)
    config: MethodConfig = adapter.method.config
    rslora = config.use_rslora
    alphas = {p: round(scales[p] * (r**0.5 if rslora else r), 9) for p, r in ranks.items()}
    r, alpha, rank_pattern, alpha_pattern = uneven(ranks, alphas)
    others = [path for path in all_linears(model) if path not in sites]
    return AdapterTensors.build(
        peft_config(
            r,
            alpha,
            target_modules=target_names(list(sites), others),
            lora_dropout=config.lora_dropout,
            use_rslora=rslora,
            use_dora=next(iter(sites.values())).magnitude is not None,
            fan_in_fan_out=any(adapter.sites[p].transposed for p in sites),
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        ),
        sites,
    )


def _still_says(
    config: Mapping[str, Any], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> bool:
    """Whether the config an adapter came with still describes its rows."""
    try:
        found = site_scaling(config, ranks)
    except FormatError:
        return False
    return all(abs(found[path][2] - scale) < 1e-9 * max(1, scale) for path, scale in scales.items())


def all_linears(model: nn.Module) -> list[str]:
    """Module paths of every linear of the model, under their names without adapters."""
    return [
        path.replace(".base_layer", "")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
