"""What is refused before a model is touched: names that cannot be stored, models that are not bare."""

from __future__ import annotations

import re

from torch import nn

from loramux.core.linear import LoraLinear

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> None:
    """Adapter names become module keys, folder names and labels."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name an adapter; use 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first "
            "(pass name=...)"
        )


def check_bare(model: nn.Module) -> None:
    """Refuse a model that is already wrapped, by loramux or by PEFT, as a whole or in part."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            raise ValueError(
                "this model, or a part of it, already has adapters attached; use handle.add(config, name=...) or "
                "handle.load(DIR, name=...) on its handle (loramux.handle_of(model)), or handle.detach() first"
            )
        if getattr(type(module), "serves_engine", False):
            raise ValueError(
                "this model serves an engine; close that engine first, or load the base a second time"
            )
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                "this model is wrapped by PEFT; call merge_and_unload() or unload() on it first, or save the PEFT "
                "adapter and load its folder with loramux.load"
            )
