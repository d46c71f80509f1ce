"""loramux: train, compose, route and serve mixtures of LoRA experts over an unmodified transformers model.

The names below are the public API; they are imported when first used, so `import loramux` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.api import Handle, attach, load
    from loramux.core.attach import handle_of
    from loramux.core.bank import Rows
    from loramux.core.method import Method, MethodConfig
    from loramux.core.router import Router, RouteView
    from loramux.core.types import Expert, Route, RouteRecord, Site
    from loramux.engine.aio import AsyncEngine
    from loramux.engine.engine import Engine
    from loramux.engine.request import Completion, Request, SamplingParams
    from loramux.methods import config_from_dict, list_methods, load_method
    from loramux.methods.lora import LoraConfig
    from loramux.methods.milora import MiLoRAConfig
    from loramux.methods.mixlora import MixLoRAConfig
    from loramux.methods.mole import MoLEConfig

__version__ = "0.1.0"

_WHERE = {
    "AsyncEngine": "loramux.engine.aio",
    "Completion": "loramux.engine.request",
    "Engine": "loramux.engine.engine",
    "Expert": "loramux.core.types",
    "Handle": "loramux.api",
    "LoraConfig": "loramux.methods.lora",
    "Method": "loramux.core.method",
    "MethodConfig": "loramux.core.method",
    "MiLoRAConfig": "loramux.methods.milora",
    "MixLoRAConfig": "loramux.methods.mixlora",
    "MoLEConfig": "loramux.methods.mole",
    "Request": "loramux.engine.request",
    "Route": "loramux.core.types",
    "RouteRecord": "loramux.core.types",
    "RouteView": "loramux.core.router",
    "Router": "loramux.core.router",
    "Rows": "loramux.core.bank",
    "SamplingParams": "loramux.engine.request",
    "Site": "loramux.core.types",
    "attach": "loramux.api",
    "config_from_dict": "loramux.methods",
    "handle_of": "loramux.core.attach",
    "list_methods": "loramux.methods",
    "load": "loramux.api",
    "load_method": "loramux.methods",
}

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "Expert",
    "Handle",
    "LoraConfig",
    "Method",
    "MethodConfig",
    "MiLoRAConfig",
    "MixLoRAConfig",
    "MoLEConfig",
    "Request",
    "Route",
    "RouteRecord",
    "RouteView",
    "Router",
    "Rows",
    "SamplingParams",
    "Site",
    "__version__",
    "attach",
    "config_from_dict",
    "handle_of",
    "list_methods",
    "load",
    "load_method",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
