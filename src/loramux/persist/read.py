"""Reads a folder into an adapter that fits the model, or refuses it before anything changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from loramux.core.adapter import Adapter
from loramux.core.frozen import expert_names
from loramux.core.guards import check_name
from loramux.core.method import Method
from loramux.core.types import Site
from loramux.formats.errors import FormatError
from loramux.formats.jsonio import read_json_object
from loramux.formats.mixlora import read_mixlora
from loramux.formats.mixture import MixtureTensors, is_mixture, read_mixture
from loramux.formats.moe_peft import KINDS
from loramux.formats.peft import read_peft
from loramux.formats.tensors import AdapterTensors, zero_sites
from loramux.methods import config_from_dict, load_method
from loramux.methods.lora import LoraConfig, LoraMethod
from loramux.ops.contract import Spans
from loramux.persist.base import BaseIdentity
from loramux.persist.moe_peft import read_gated
from loramux.persist.names import RANKS, slot_order
from loramux.persist.published import mixlora_adapter
from loramux.persist.routers import load_routers
from loramux.persist.rows import all_sites, file_scales, match_sites, method_rows, stack_experts

log = logging.getLogger(__name__)


def read_adapter(
    model: nn.Module,
    sites: Sequence[Site],
    folder: Path,
    name: str | None,
    trainable: bool,
    check_base: bool,
    base: BaseIdentity | None = None,
) -> Adapter:
    """Build the adapter a folder holds, checked against the model's sites; the model is not touched.

    base: what is known of the model already, if many adapters are read.
    """
    name = name if name is not None else folder.resolve().name
    check_name(name)
    _check_folder(folder)
    own = (base or BaseIdentity(model)) if check_base else None
    if is_mixture(folder):
        saved = read_mixture(folder, allow_zero=trainable)
        adapter = _from_mixture(sites, saved, name, own)
    elif _peft_type(folder) in KINDS:
        adapter = read_gated(sites, folder, name, allow_zero=trainable)
    elif _peft_type(folder) == "MIXLORA":
        config, published = read_mixlora(folder, allow_zero=trainable)
        activation = getattr(getattr(model, "config", None), "hidden_act", None)
        adapter = mixlora_adapter(sites, config, published, name, activation)
    else:
        tensors = _read_peft(folder, trainable)
        adapter = _from_peft(sites, tensors, name, str(folder))
        if own is not None:
            own.check_record(folder, tensors.sites)
    adapter.set_trainable(trainable)
    return adapter


def is_plain(folder: Path) -> bool:
    """Whether the folder holds one PEFT adapter, and neither a mixture nor one in a published layout."""
    _check_folder(folder)
    return not is_mixture(folder) and _peft_type(folder) not in ("MIXLORA", *KINDS)


def read_plain(
    sites: Sequence[Site], folder: Path, base: BaseIdentity | None
) -> tuple[AdapterTensors, dict[str, Site], dict[str, Spans]]:
    """A PEFT adapter as tensors, with the model's sites it names (in declared order) and its spans there.

    As `read_adapter`, without making modules of it; `base` None: whose base it is, is not checked.
    """
    tensors = _read_peft(folder, trainable=False)
    found = match_sites(sites, tensors, str(folder))
    if base is not None:
        base.check_record(folder, tensors.sites)
    (scales,) = file_scales([tensors], str(folder))
    kinds = {path: (tensors.sites[path].rank, scales[path]) for path in found}
    made = {kind: Spans.packed([kind[0]], [kind[1]]) for kind in set(kinds.values())}
    return tensors, found, {path: made[kind] for path, kind in kinds.items()}


def _read_peft(folder: Path, trainable: bool) -> AdapterTensors:
    tensors = read_peft(folder, allow_zero=trainable)
    for path in zero_sites(tensors) if not trainable else ():
        log.warning("%s: the rows of %s are zero and change nothing", folder, path)
    return tensors


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; give the folder an adapter was saved to")


def _peft_type(folder: Path) -> str | None:
    for name in ("adapter_config.json", "mixlora_config.json"):
        if (folder / name).is_file():
            found = read_json_object(folder / name)
            if name == "mixlora_config.json":
                return "MIXLORA"
            kind = found.get("peft_type")
            return kind if isinstance(kind, str) else None
    return None


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


def _from_mixture(
    sites: Sequence[Site], saved: MixtureTensors, name: str, base: BaseIdentity | None
) -> Adapter:
    if base is not None:
        base.check_digest(saved.base_digest, saved.base_name)
    adapter = mixture_adapter(sites, saved, name)
    load_routers(adapter, saved.router)
    return adapter


def mixture_adapter(sites: Sequence[Site], saved: MixtureTensors, name: str) -> Adapter:
    """A mixture's experts at the model's sites under fresh routers, which still want what was saved."""
    config = config_from_dict({"name": saved.method, **saved.config})
    method = load_method(saved.method)(config)
    _check_order(method, list(saved.experts))
    if method.needs_adapters:
        adapter = gate(sites, method, saved.experts, name)
    else:
        found = all_sites(sites, saved.experts)
        chosen = list(found.values())
        # First: what `experts` says may depend on which layers there are.
        method.check_sites(chosen)
        rows = method_rows(found, saved.experts, method, saved.method)
        adapter = Adapter(name, method, found, rows, method.routers(chosen))
    adapter.saved_configs = {key: e.config for key, e in saved.experts.items()}
    return adapter


def _check_order(method: Method, names: list[str]) -> None:
    """A router is trained for one order of its experts: in another it would weigh the wrong ones."""
    if method.needs_adapters:
        expected = getattr(method.config, "adapters", ())
    else:
        expected = [RANKS] if method.folder_layout == "one" else sorted(names, key=slot_order)
    if names != list(expected):
        raise FormatError(
            f"the mixture lists its experts as {names}, its router was trained with the order {list(expected)}; "
            "restore mixture_config.json",
            code="bad_value",
        )


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
    found = all_sites(sites, experts)
    rows = stack_experts(found, list(experts.values()), method.title)
    routers = method.routers(list(found.values()))
    for path, router in routers.items():
        bind = getattr(router, "bind", None)
        if bind is not None:
            bind(rows[path])
    adapter = Adapter(name, method, found, rows, routers, tuple(experts))
    adapter.saved_configs = {key: e.config for key, e in experts.items()}
    return adapter
