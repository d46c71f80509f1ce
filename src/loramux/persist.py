"""Adapters between disk and memory: which method a folder holds, and which expert's rows go to which slot.

A static adapter is one PEFT folder. A mixture has one PEFT folder per expert: `expert_<i>` where a site holds several,
`shared` for the sites that hold one, `lora` where every site holds one; frozen adapters under a gate keep their names.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.adapter import Adapter
from loramux.core.attach import HOLDER
from loramux.core.bank import Rows
from loramux.core.method import Method, MethodConfig
from loramux.core.types import Site
from loramux.formats.digest import base_digest, model_digest
from loramux.formats.errors import FormatError
from loramux.formats.jsonio import read_json_object
from loramux.formats.mixlora import read_mixlora, write_mixlora
from loramux.formats.mixture import MixtureTensors, is_mixture, read_mixture, write_mixture
from loramux.formats.peft import peft_config, read_peft, write_peft
from loramux.formats.scaling import site_scaling, target_names, uneven
from loramux.formats.tensors import AdapterTensors, SiteTensors, zero_sites
from loramux.methods import config_from_dict, load_method
from loramux.methods.lora import LoraConfig, LoraMethod
from loramux.methods.mole import expert_names
from loramux.mixlora_import import mixlora_adapter, mixlora_config, mixlora_tensors
from loramux.ops.contract import Spans

log = logging.getLogger(__name__)
IN_MEMORY = "model:"  # how `model_digest` begins


def read_adapter(
    model: nn.Module,
    sites: Sequence[Site],
    folder: Path,
    name: str | None,
    trainable: bool,
    check_base: bool,
) -> Adapter:
    """Build the adapter a folder holds, checked against the model's sites; the model is not touched."""
    name = name if name is not None else folder.name
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; give the folder an adapter was saved to")
    if is_mixture(folder):
        saved = read_mixture(folder, allow_zero=trainable)
        adapter = _from_mixture(model, sites, saved, name, check_base)
    elif _peft_type(folder) == "MIXLORA":
        config, published = read_mixlora(folder, allow_zero=trainable)
        activation = getattr(getattr(model, "config", None), "hidden_act", None)
        adapter = mixlora_adapter(sites, config, published, name, activation)
    else:
        tensors = read_peft(folder, allow_zero=trainable)
        for path in zero_sites(tensors) if not trainable else ():
            log.warning("%s: the rows of %s are zero and change nothing", folder, path)
        adapter = _from_peft(sites, tensors, name, str(folder))
    adapter.set_trainable(trainable)
    return adapter


def _peft_type(folder: Path) -> str | None:
    for name in ("adapter_config.json", "mixlora_config.json"):
        if (folder / name).is_file():
            found = read_json_object(folder / name)
            if name == "mixlora_config.json":
                return "MIXLORA"
            kind = found.get("peft_type")
            return kind if isinstance(kind, str) else None
    return None


# --- Reading ------------------------------------------------------------------------------------


def _from_peft(sites: Sequence[Site], tensors: AdapterTensors, name: str, where: str) -> Adapter:
    found = match_sites(sites, tensors, where)
    rows = stack_experts(found, [tensors], where)
    config = lora_config(tensors)
    adapter = Adapter(name, LoraMethod(config), found, rows, {})
    adapter.saved_configs = {"lora": tensors.config}
    return adapter


def lora_config(tensors: AdapterTensors) -> LoraConfig:
    """What a PEFT config says, as our config."""
    given = tensors.config
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    kept = {key: value for key, value in given.items() if key in names and value is not None}
    kept.pop("init_lora_weights", None)
    kept["target_modules"] = tuple(tensors.sites)
    kept.pop("exclude_modules", None)
    kept.pop("layers_to_transform", None)
    return LoraConfig(**{"lora_alpha": 8, **kept})


def match_sites(sites: Sequence[Site], tensors: AdapterTensors, where: str) -> dict[str, Site]:
    """The model's sites an adapter names, in declared order; refuses missing modules and other shapes."""
    by_path = {site.path: site for site in sites}
    missing = [path for path in tensors.sites if path not in by_path]
    if missing:
        raise FormatError(
            f"{where} targets {missing[:3]}{' ...' if len(missing) > 3 else ''}, which this model does not have as a "
            f"linear of a decoder layer; it was trained on another base. This one has {sorted({s.name for s in sites})}"
        )
    for path, entry in tensors.sites.items():
        site = by_path[path]
        if (entry.d_in, entry.d_out) != (site.d_in, site.d_out):
            raise FormatError(
                f"{where}: {path} is {entry.d_in} -> {entry.d_out} in the adapter and {site.d_in} -> {site.d_out} in "
                "this model; it was trained on another base"
            )
    return {site.path: site for site in sites if site.path in tensors.sites}


def stack_experts(
    sites: Mapping[str, Site], experts: Sequence[AdapterTensors], where: str
) -> dict[str, Rows]:
    """Rows per site with one slot per expert, in order; an expert that leaves a site out gets rank 0 there."""
    scales = [
        site_scaling(e.config, {path: s.rank for path, s in e.sites.items()}, where)
        for e in experts
    ]
    rows = {}
    for path, site in sites.items():
        parts = [e.sites.get(path) for e in experts]
        spans = Spans.packed(
            [0 if p is None else p.rank for p in parts],
            [1.0 if p is None else s[path][2] for p, s in zip(parts, scales, strict=True)],
        )
        present = [p for p in parts if p is not None]
        magnitudes = [p.magnitude for p in present if p.magnitude is not None]
        if magnitudes and len(magnitudes) != len(parts):
            raise FormatError(f"{where}: at {path} some experts are DoRA and some are not")
        rows[path] = Rows(
            spans,
            _joined([p.a for p in present]),
            _joined([p.b for p in present]),
            torch.stack(magnitudes) if magnitudes else None,
        )
        assert rows[path].a.shape[1] == site.d_in
    return rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts)).contiguous()


def _from_mixture(
    model: nn.Module, sites: Sequence[Site], saved: MixtureTensors, name: str, check_base: bool
) -> Adapter:
    if check_base:
        check_base_digest(model, saved.base_digest, saved.base_name)
    config = config_from_dict({"name": saved.method, **saved.config})
    method = load_method(saved.method)(config)
    _check_order(method, list(saved.experts))
    if method.needs_adapters:
        adapter = gate(sites, method, saved.experts, name)
    else:
        found = _union(sites, saved.experts)
        rows = {}
        for path, site in found.items():
            here = [e for e in saved.experts.values() if path in e.sites]
            rows.update(stack_experts({path: site}, here, saved.method))
            want = len(method.experts(site))
            if len(here) != want:
                raise FormatError(f"{path} has {len(here)} experts, its config asks for {want}")
        chosen = list(found.values())
        method.check_sites(chosen)
        adapter = Adapter(name, method, found, rows, method.routers(chosen))
    adapter.saved_configs = {key: e.config for key, e in saved.experts.items()}
    _load_router(adapter, saved.router)
    return adapter


def _check_order(method: Method, names: list[str]) -> None:
    """A router is trained for one order of its experts: in another it would weigh the wrong ones."""
    gated = method.needs_adapters
    expected = getattr(method.config, "adapters", ()) if gated else sorted(names, key=_slot_order)
    if names != list(expected):
        raise FormatError(
            f"the mixture lists its experts as {names}, its router was trained with the order {list(expected)}; "
            "restore mixture_config.json",
            code="bad_value",
        )


def _load_router(adapter: Adapter, router: Mapping[str, Tensor]) -> None:
    own = dict(adapter.routers_by_key.named_parameters())
    if own.keys() != router.keys():
        raise FormatError(
            f"router.safetensors lacks {sorted(own.keys() - router.keys())[:3]} and has unexpected "
            f"{sorted(router.keys() - own.keys())[:3]}; it belongs to another mixture or another base"
        )
    for key, parameter in own.items():
        if parameter.shape != router[key].shape:
            raise FormatError(
                f"router tensor {key} is {tuple(router[key].shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.data = router[key].clone()


def _union(sites: Sequence[Site], experts: Mapping[str, AdapterTensors]) -> dict[str, Site]:
    touched: set[str] = set()
    for name, expert in experts.items():
        touched |= match_sites(sites, expert, name).keys()
    return {site.path: site for site in sites if site.path in touched}


def gated_adapter(model: nn.Module, sites: Sequence[Site], method: Method, name: str) -> Adapter:
    """A gate over trained adapters: reads the folders its config names, in that order."""
    folders = [Path(folder) for folder in getattr(method.config, "adapters", ())]
    if not folders:
        raise ValueError(f"{method.title} needs trained adapters; list their folders in `adapters`")
    names = expert_names([str(folder) for folder in folders])
    experts = {own: read_peft(folder) for own, folder in zip(names, folders, strict=True)}
    adapter = gate(sites, method, experts, name)
    adapter.set_trainable(True)
    return adapter


def gate(
    sites: Sequence[Site], method: Method, experts: Mapping[str, AdapterTensors], name: str
) -> Adapter:
    found = _union(sites, experts)
    rows = stack_experts(found, list(experts.values()), method.title)
    routers = method.routers(list(found.values()))
    for path, router in routers.items():
        bind = getattr(router, "bind", None)
        if bind is not None:
            bind(rows[path])
    adapter = Adapter(name, method, found, rows, routers, tuple(experts))
    adapter.saved_configs = {key: e.config for key, e in experts.items()}
    return adapter


# --- Writing ------------------------------------------------------------------------------------


def write_adapter(model: nn.Module, adapter: Adapter, folder: Path) -> Path:
    """Save rows, routers and config; the servability class decides the layout."""
    experts = expert_tensors(model, adapter)
    method = adapter.method
    if method.servability == "static":
        (tensors,) = experts.values()
        write_peft(folder, tensors)
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
        router={k: p.detach().contiguous() for k, p in adapter.routers_by_key.named_parameters()},
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
    parts: dict[str, dict[str, tuple[SiteTensors, float]]] = {}
    for path, rows in adapter.rows.items():
        num = rows.spans.num_slots
        for slot in range(num):
            if rows.spans.rank[slot] == 0:
                continue
            at = rows.slot_rows(slot)
            entry = SiteTensors(
                rows.a.detach()[at],
                rows.b.detach()[at],
                None if rows.magnitude is None else rows.magnitude.detach()[slot],
            )
            key = _expert_name(adapter, slot, num, most)
            parts.setdefault(key, {})[path] = (entry, rows.spans.scale[slot])
    order = [name for name in (adapter.experts or sorted(parts, key=_slot_order)) if name in parts]
    return {name: _one_expert(model, adapter, name, parts[name]) for name in order}


def _expert_name(adapter: Adapter, slot: int, num: int, most: int) -> str:
    if adapter.experts:
        return adapter.experts[slot]
    if most == 1:
        return "lora"
    return "shared" if num == 1 else f"expert_{slot}"


def _slot_order(name: str) -> tuple[int, str]:
    number = name.rpartition("_")[2]
    return (int(number) if number.isdigit() else -1, name)


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


# --- The base ------------------------------------------------------------------------------------


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
