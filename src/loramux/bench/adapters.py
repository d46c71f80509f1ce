"""The adapters that are timed, saved to folders first: what users load is what is measured.

Why the `B` factors are random: with zeros the adapter would be refused as one that changes nothing. Why most plain
adapters are derived from one: rolling the rows of `B` gives another adapter of the same size in milliseconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
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
STD_GATE = 0.02  # logits of a late gate then differ by about one
TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Folders:
    """One saved adapter per kind."""

    lora: Path
    lora_fp32: Path
    milora: Path
    mixlora: Path


@dataclass(frozen=True)
class Tenants:
    """Many adapters, all different. Each gated mixture is over `gated_of` plain ones."""

    plain: tuple[Path, ...]
    milora: tuple[Path, ...] = ()
    mixlora: tuple[Path, ...] = ()
    gated: tuple[Path, ...] = ()


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
        lora=_save(model, made["lora"], folder / "lora"),
        lora_fp32=_save(model, made["lora"], folder / "lora_fp32", torch.float32),
        milora=_save(model, made["milora"], folder / "milora"),
        mixlora=_save(model, made["mixlora"], folder / "mixlora"),
    )


def save_tenants(
    model: PreTrainedModel,
    folder: Path,
    *,
    plain: int,
    milora: int = 0,
    mixlora: int = 0,
    gated: int = 0,
    gated_of: int = 4,
    done: Callable[[], None] = lambda: None,
) -> Tenants:
    """So many of each kind, a gated one over `gated_of` of the plain ones; `done` is called after each."""
    made = configs()

    def several(kind: str, count: int) -> tuple[Path, ...]:
        found = []
        for i in range(count):
            found.append(_save(model, made[kind], folder / f"{kind}-{i}", seed=i))
            done()
        return tuple(found)

    first = _save(model, made["lora"], folder / "plain-0")
    lora = [first]
    done()
    for i in range(1, plain):
        lora.append(derive(first, folder / f"plain-{i}", i))
        done()
    mixtures = []
    for i in range(gated):
        of = [str(lora[(i + j) % plain]) for j in range(gated_of)]
        config = loramux.MoLEConfig(adapters=tuple(of))
        mixtures.append(_save(model, config, folder / f"gated-{i}", seed=i, gates=True))
        done()
    return Tenants(
        tuple(lora), several("milora", milora), several("mixlora", mixlora), tuple(mixtures)
    )


def derive(source: Path, target: Path, shift: int) -> Path:
    """Another plain adapter: the same files with the rows of every `B` rolled by `shift`."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != TENSORS:
            shutil.copy(file, target / file.name)
    tensors = {
        name: tensor.roll(shift, 0) if "lora_B" in name else tensor
        for name, tensor in load_file(source / TENSORS).items()
    }
    save_file(tensors, target / TENSORS, metadata={"format": "pt"})
    return target


def by_name(folders: Sequence[Path]) -> dict[str, Path]:
    """Adapters under the names of their folders."""
    return {folder.name: folder for folder in folders}


def _save(
    model: Any,
    config: MethodConfig,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    gates: bool = False,
) -> Path:
    torch.manual_seed(seed)
    handle = loramux.attach(model, config)
    try:
        (randomise_gates if gates else randomise)(handle)
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


@torch.no_grad()
def randomise_gates(handle: Handle) -> None:
    """Fresh late gates weigh all experts alike; these do not."""
    for adapter in handle.adapters.values():
        for router in adapter.routers.values():
            weight = router.weight
            assert isinstance(weight, torch.Tensor)
            weight.normal_(std=STD_GATE)
