"""Names of a mixture's experts on disk, and their order."""

from __future__ import annotations

from loramux.core.adapter import Adapter

RANKS = "ranks"  # the one folder of a mixture whose experts are ranks


def expert_name(adapter: Adapter, slot: int, num: int, most: int) -> str:
    if adapter.experts:
        return adapter.experts[slot]
    if most == 1:
        return "lora"
    return "shared" if num == 1 else f"expert_{slot}"


def slot_order(name: str) -> tuple[int, str]:
    number = name.rpartition("_")[2]
    return (int(number) if number.isdigit() else -1, name)
