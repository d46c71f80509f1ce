"""loramux: train, compose, route and serve mixtures of LoRA experts over an unmodified transformers model.

The names below are the public API; they are imported when first used, so `import loramux` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.api import Handle, attach, load
    from loramux.compose.lower import lower_adapter
    from loramux.compose.run import compose_adapters
    from loramux.core.attach import handle_of
    from loramux.core.bank import Rows
    from loramux.core.method import Method, MethodConfig
    from loramux.core.router import Router, RouteView
    from loramux.core.types import Expert, Route, RouteRecord, Site
    from loramux.engine.aio import AsyncEngine
    from loramux.engine.engine import Engine
    from loramux.engine.request import Completion, Request, SamplingParams
    from loramux.methods import config_from_dict, list_methods, load_method
    from loramux.methods.alora import ALoRAConfig
    from loramux.methods.arrow import ArrowConfig
    from loramux.methods.beamlora import BeamLoRAConfig
    from loramux.methods.fanlora import FanLoRAConfig
    from loramux.methods.hydralora import HydraLoRAConfig
    from loramux.methods.lora import LoraConfig
    from loramux.methods.loraflow import LoRAFlowConfig
    from loramux.methods.loramoe import LoRAMoEConfig
    from loramux.methods.midora import MiDoRAConfig
    from loramux.methods.milora import MiLoRAConfig
    from loramux.methods.mixdora import MixDoRAConfig
    from loramux.methods.mixlora import MixLoRAConfig
    from loramux.methods.moelora import MOELoRAConfig
    from loramux.methods.mola import MoLAConfig
    from loramux.methods.mole import MoLEConfig
    from loramux.methods.molora import MoLoRAConfig
    from loramux.methods.ramole import RAMoLEConfig
    from loramux.methods.smora import SMoRAConfig
    from loramux.methods.xlora import XLoraConfig

__version__ = "0.1.0"

_WHERE = {
    "ALoRAConfig": "loramux.methods.alora",
    "ArrowConfig": "loramux.methods.arrow",
    "AsyncEngine": "loramux.engine.aio",
    "BeamLoRAConfig": "loramux.methods.beamlora",
    "Completion": "loramux.engine.request",
    "Engine": "loramux.engine.engine",
    "Expert": "loramux.core.types",
    "FanLoRAConfig": "loramux.methods.fanlora",
    "Handle": "loramux.api",
    "HydraLoRAConfig": "loramux.methods.hydralora",
    "LoRAFlowConfig": "loramux.methods.loraflow",
    "LoRAMoEConfig": "loramux.methods.loramoe",
    "LoraConfig": "loramux.methods.lora",
    "MOELoRAConfig": "loramux.methods.moelora",
    "Method": "loramux.core.method",
    "MethodConfig": "loramux.core.method",
    "MiDoRAConfig": "loramux.methods.midora",
    "MiLoRAConfig": "loramux.methods.milora",
    "MixDoRAConfig": "loramux.methods.mixdora",
    "MixLoRAConfig": "loramux.methods.mixlora",
    "MoLAConfig": "loramux.methods.mola",
    "MoLEConfig": "loramux.methods.mole",
    "MoLoRAConfig": "loramux.methods.molora",
    "RAMoLEConfig": "loramux.methods.ramole",
    "Request": "loramux.engine.request",
    "Route": "loramux.core.types",
    "RouteRecord": "loramux.core.types",
    "RouteView": "loramux.core.router",
    "Router": "loramux.core.router",
    "Rows": "loramux.core.bank",
    "SMoRAConfig": "loramux.methods.smora",
    "SamplingParams": "loramux.engine.request",
    "Site": "loramux.core.types",
    "XLoraConfig": "loramux.methods.xlora",
    "attach": "loramux.api",
    "compose_adapters": "loramux.compose.run",
    "config_from_dict": "loramux.methods",
    "handle_of": "loramux.core.attach",
    "list_methods": "loramux.methods",
    "load": "loramux.api",
    "load_method": "loramux.methods",
    "lower_adapter": "loramux.compose.lower",
}

__all__ = [
    "ALoRAConfig",
    "ArrowConfig",
    "AsyncEngine",
    "BeamLoRAConfig",
    "Completion",
    "Engine",
    "Expert",
    "FanLoRAConfig",
    "Handle",
    "HydraLoRAConfig",
    "LoRAFlowConfig",
    "LoRAMoEConfig",
    "LoraConfig",
    "MOELoRAConfig",
    "Method",
    "MethodConfig",
    "MiDoRAConfig",
    "MiLoRAConfig",
    "MixDoRAConfig",
    "MixLoRAConfig",
    "MoLAConfig",
    "MoLEConfig",
    "MoLoRAConfig",
    "RAMoLEConfig",
    "Request",
    "Route",
    "RouteRecord",
    "RouteView",
    "Router",
    "Rows",
    "SMoRAConfig",
    "SamplingParams",
    "Site",
    "XLoraConfig",
    "__version__",
    "attach",
    "compose_adapters",
    "config_from_dict",
    "handle_of",
    "list_methods",
    "load",
    "load_method",
    "lower_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
