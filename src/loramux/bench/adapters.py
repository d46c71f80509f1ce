"""The adapters that are timed, saved to folders first: what users load is what is measured.

Why the `B` factors are random: with zeros the adapter would be refused as one that changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.core.method import MethodConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loramux import Handle

RANK = 8
STD_B = 0.02


@dataclass(frozen=True)
class Folders:
    """One saved adapter per kind."""

    lora: Path
    lora_fp32: Path
    milora: Path
    mixlora: Path


def configs() -> dict[str, MethodConfig]:
    """Scale 2 everywhere, no dropout; the rest are each method's defaults (8 experts top-2, 3 modules of 7)."""
    return {
        "lora": loramux.LoraConfig(r=RANK, lora_alpha=2 * RANK),
        "milora": loramux.MiLoRAConfig(r=RANK, lora_alpha=2 * RANK, top_k=3),
        "mixlora": loramux.MixLoRAConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, num_experts=8, top_k=2
        ),
    }


def save_adapters(model: PreTrainedModel, folder: Path) -> Folders:
    """Write all of them for this base; the model is left as it was."""
    made = configs()
    return Folders(
        lora=_save(model, made["lora"], folder / "lora", torch.bfloat16),
        lora_fp32=_save(model, made["lora"], folder / "lora_fp32", torch.float32),
        milora=_save(model, made["milora"], folder / "milora", torch.bfloat16),
        mixlora=_save(model, made["mixlora"], folder / "mixlora", torch.bfloat16),
    )


def _save(model: Any, config: MethodConfig, folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    handle = loramux.attach(model, config)
    try:
        randomise(handle)
        for adapter in handle.adapters.values():
            for rows in adapter.rows.values():
                rows.a.data, rows.b.data = rows.a.data.to(dtype), rows.b.data.to(dtype)
        handle.save(folder)
    finally:
        handle.detach()
    return folder


@torch.no_grad()
def randomise(handle: Handle) -> None:
    for adapter in handle.adapters.values():
        for rows in adapter.rows.values():
            rows.b.normal_(std=STD_B)
