"""The models that are compared, each over its own copy of the base, each loaded from disk as a user would load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.bench.adapters import Folders
from loramux.bench.shape import copy_of, twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BARE = "bare"
BARE_COPY = "bare copy"
LORA = "lora"
LORA_COPY = "lora copy"
LORA_FP32 = "lora fp32"
PEFT = "peft"
PEFT_FP32 = "peft fp32"
MILORA = "milora"
MIXLORA = "mixlora"
PACKAGE = "mixlora package"

TITLES = {
    BARE: "bare transformers model",
    BARE_COPY: "a second copy of the bare model",
    LORA: "LoRA r=8 on all seven linears",
    LORA_COPY: "a second copy of LoRA r=8",
    LORA_FP32: "LoRA r=8 on all seven linears, fp32 rows",
    PEFT: "PEFT, the same LoRA unmerged",
    PEFT_FP32: "PEFT, the same LoRA unmerged, fp32 rows (its default)",
    MILORA: "MiLoRA r=8 top-3 of 7, routing cached",
    MIXLORA: "MixLoRA r=8, 8 experts top-2",
    PACKAGE: "mixlora package, the same mixture",
}


@dataclass(frozen=True)
class Lineup:
    """What can be timed here, and what cannot with the reason."""

    models: dict[str, Any]
    absent: dict[str, str]


def line_up(base: PreTrainedModel, folders: Folders, advance: Callable[[], None]) -> Lineup:
    """Build every subject. The first one is `base` itself."""
    makers: dict[str, Callable[[], Any]] = {
        BARE: lambda: base,
        BARE_COPY: lambda: copy_of(base),
        LORA: lambda: _ours(base, folders.lora),
        LORA_COPY: lambda: _ours(base, folders.lora),
        LORA_FP32: lambda: _ours(base, folders.lora_fp32),
        PEFT: lambda: _peft(base, folders.lora, autocast_adapter_dtype=False),
        PEFT_FP32: lambda: _peft(base, folders.lora_fp32),
        MILORA: lambda: _ours(base, folders.milora),
        MIXLORA: lambda: _ours(base, folders.mixlora),
        PACKAGE: lambda: package(copy_of(base), folders.mixlora),
    }
    models, absent = {}, {}
    for name, make in makers.items():
        try:
            models[name] = make()
        except ModuleNotFoundError as error:
            absent[name] = f"{error.name} is not installed"
        advance()
    return Lineup(models, absent)


def close_lineup(base: PreTrainedModel, folders: Folders) -> dict[str, Any]:
    """Models over one set of base weights: what differs is only what the adapter makes of them."""
    of = {LORA: folders.lora, LORA_COPY: folders.lora, MILORA: folders.milora}
    return {name: _attached(twin_of(base), folder) for name, folder in of.items()}


def _ours(base: PreTrainedModel, folder: Any) -> Any:
    return _attached(copy_of(base), folder)


def _attached(model: Any, folder: Any) -> Any:
    loramux.load(model, folder)
    return model


def _peft(base: PreTrainedModel, folder: Any, **options: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy_of(base), folder, **options).eval()


def package(model: Any, folder: Any) -> Any:
    """The published implementation around `model`, given the rows of our mixture."""
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    handle = loramux.load(twin_of(model), folder)
    (adapter,) = handle.adapters.values()
    own: Any = adapter.method.config
    config = MixLoraConfig.from_config(
        {
            "peft_type": "MIXLORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "",
            "routing_strategy": "mixlora",
            "r": own.r,
            "lora_alpha": int(own.lora_alpha),
            "lora_dropout": 0.05,  # it insists on some; none is applied in eval mode
            "target_modules": sorted({site.name.split(".")[-1] for site in adapter.sites.values()}),
            "num_experts": own.num_experts,
            "top_k": own.top_k,
            "act_fn": model.config.hidden_act,  # blank means None to it, and fails
        }
    )
    config.dtype_ = torch.bfloat16
    inject_adapter_in_model(model, config, _package_weights(adapter))
    return model.eval()


def _package_weights(adapter: Any) -> dict[str, torch.Tensor]:
    named = {}
    for path, router in adapter.routers.items():
        layer = adapter.layer_of(path)
        named[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = router.weight.detach()
    for path, rows in adapter.rows.items():
        site = adapter.sites[path]
        for slot in range(rows.spans.num_slots):
            own = f".experts.{slot}" if site.kind == "ffn" else ""
            key, at = f"mixlora.layers.{site.layer}.{site.name}{own}", rows.slot_rows(slot)
            named[f"{key}.lora_A.weight"] = rows.a.detach()[at].clone()
            named[f"{key}.lora_B.weight"] = rows.b.detach()[at].T.contiguous()
    return named
