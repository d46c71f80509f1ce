"""A LoRAMoE or MoLA folder of MoE-PEFT becomes an attached adapter, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramux.core.adapter import Adapter
from loramux.core.bank import Rows
from loramux.core.mixing import GateConfig, GatedMethod, LinearGate
from loramux.core.types import Site
from loramux.formats.errors import FormatError
from loramux.formats.moe_peft import GatedTensors, read_moe_peft, write_moe_peft
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.methods.loramoe import LoRAMoEConfig, LoRAMoEMethod
from loramux.methods.mola import MoLAConfig, MoLAMethod
from loramux.persist.rows import all_sites, stack_experts

SHARED = ("r", "lora_alpha", "lora_dropout", "use_rslora")


def read_gated(
    sites: Sequence[Site], folder: Path, name: str, *, allow_zero: bool = False
) -> Adapter:
    """Check the tensors against the model's sites and stack the experts."""
    saved = read_moe_peft(folder, allow_zero=allow_zero)
    try:
        method = _method(saved)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{folder}: {error}", code="bad_value") from error
    most = max(len(experts) for experts in saved.experts.values())
    each = [
        AdapterTensors.build(
            _lora(saved), {p: e[i] for p, e in saved.experts.items() if i < len(e)}
        )
        for i in range(most)
    ]
    found = all_sites(sites, {str(i): expert for i, expert in enumerate(each)})
    chosen = list(found.values())
    method.check_sites(chosen)
    rows: dict[str, Rows] = {}
    for path, site in found.items():
        own = [expert for expert in each if path in expert.sites]
        rows |= stack_experts({path: site}, own, str(folder))
    routers = method.routers(chosen)
    for path, router in routers.items():
        assert isinstance(router, LinearGate)
        if path not in saved.gates:
            raise FormatError(f"{folder}: {path} has no gate", code="missing_tensor")
        router.weight = nn.Parameter(saved.gates[path].float().clone())
    return Adapter(name, method, found, rows, routers)


def _method(saved: GatedTensors) -> GatedMethod:
    config = saved.config
    shared: dict[str, Any] = {key: config[key] for key in SHARED}
    shared["target_modules"] = tuple(saved.experts)
    if config["peft_type"] == "MOLA":
        own = MoLAConfig(
            **shared,
            experts_per_layer=(config["num_experts"],),
            top_k=config["top_k"],
            router_aux_loss_coef=config["router_aux_loss_coef"],
        )
        return MoLAMethod(own)
    plain = any(path not in saved.gates for path in saved.experts)
    moe = LoRAMoEConfig(**shared, num_experts=config["num_experts"], attention_lora=plain)
    return LoRAMoEMethod(moe)


def _lora(saved: GatedTensors) -> dict[str, Any]:
    """The config of one expert as a plain LoRA: what scales are computed from."""
    own = {key: saved.config[key] for key in SHARED}
    return {"peft_type": "LORA", **own, "target_modules": list(saved.config["target_modules"])}


def write_gated(model: nn.Module, adapter: Adapter, folder: Path) -> Path:
    """Save a LoRAMoE or MoLA in MoE-PEFT's layout; refuses what that has no field for."""
    config = adapter.method.config
    if not isinstance(config, LoRAMoEConfig | MoLAConfig):
        raise ValueError(
            f"{adapter.name!r} is a {adapter.method.title}; the layout is for LoRAMoE and MoLA"
        )
    experts = {path: _experts(adapter, path) for path in adapter.rows}
    gates = {path: r.get_parameter("weight").detach() for path, r in adapter.routers.items()}
    names = sorted({path.rpartition(".")[2] for path in experts})
    base = getattr(model, "name_or_path", None) or None
    written = _written(config, {len(experts[path]) for path in gates}, names, base)
    write_moe_peft(folder, GatedTensors(written, experts, gates))
    return folder


def _written(
    config: GateConfig, numbers: set[int], names: list[str], base: str | None
) -> dict[str, Any]:
    if config.rank_pattern or config.alpha_pattern or len(numbers) != 1:
        raise FormatError(
            f"MoE-PEFT's layout cannot say that linears differ (numbers of experts {sorted(numbers)}, rank_pattern "
            f"{dict(config.rank_pattern)}, alpha_pattern {dict(config.alpha_pattern)}); save a mixture instead",
            code="unsupported",
        )
    (number,) = numbers
    shared: dict[str, Any] = {key: getattr(config, key) for key in SHARED}
    shared |= {"num_experts": number, "target_modules": names, "base_model_name_or_path": base}
    if isinstance(config, MoLAConfig):
        coefficient = config.router_aux_loss_coef
        own = {"top_k": min(config.top_k, number), "router_aux_loss_coef": coefficient}
        return {"peft_type": "MOLA", "routing_strategy": "mola", **shared, **own}
    return {"peft_type": "LORAMOE", "routing_strategy": "loramoe", **shared}


def _experts(adapter: Adapter, path: str) -> list[SiteTensors]:
    rows = adapter.rows[path]
    a, b = rows.a.detach(), rows.b.detach()
    slots = [rows.slot_rows(slot) for slot in range(rows.spans.num_slots)]
    return [SiteTensors(a[at].to(torch.float32), b[at].to(torch.float32)) for at in slots]
