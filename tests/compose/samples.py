"""Adapters to merge: as parts of one linear, and as saved folders over a tiny model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramux.compose.mergers import load_merger
from loramux.compose.parts import Merged, Part
from loramux.core.sites import find_sites
from loramux.formats.peft import write_peft
from loramux.formats.scaling import peft_config
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.persist.base import write_base_record
from oracles.merging import Lora

D_IN, D_OUT = 12, 10
IDS = torch.tensor([[5, 17, 40, 8, 61, 23, 9, 70]])


def loras(ranks: Sequence[int], scales: Sequence[float] | None = None, seed: int = 0) -> list[Lora]:
    """Random adapters of one linear in the papers' shapes, fp64."""
    made = torch.Generator().manual_seed(seed)
    scales = scales or [2.0] * len(ranks)
    return [
        (
            torch.randn(r, D_IN, generator=made, dtype=torch.float64),
            torch.randn(D_OUT, r, generator=made, dtype=torch.float64),
            s,
        )
        for r, s in zip(ranks, scales, strict=True)
    ]


def parts(given: Sequence[Lora], weights: Sequence[float] | None = None) -> list[Part]:
    weights = weights or [1.0] * len(given)
    return [Part(a, b.T.contiguous(), s, w) for (a, b, s), w in zip(given, weights, strict=True)]


def merge(
    name: str,
    given: Sequence[Lora],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> Merged:
    merger = load_merger(name)
    return merger.merge(parts(given, weights), merger.options(**options), seed)


def product(merged: Merged) -> Tensor:
    return merged.b.T @ merged.a


def save_lora(
    model: PreTrainedModel,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    record: bool = True,
    **config: Any,
) -> Path:
    """A random adapter of `model` as a PEFT folder. targets: names of linears (default: all)."""
    made = torch.Generator().manual_seed(seed)
    chosen = [s for s in find_sites(model) if targets is None or s.name.split(".")[-1] in targets]
    sites = {}
    for site in chosen:
        r = (rank_pattern or {}).get(site.name.split(".")[-1], rank)
        a, b = (torch.randn(r, d, generator=made) * 0.1 for d in (site.d_in, site.d_out))
        magnitude = torch.rand(site.d_out, generator=made) + 0.5
        sites[site.path] = SiteTensors(a, b, magnitude if config.get("use_dora") else None)
    names = sorted({site.name.split(".")[-1] for site in chosen})
    fields = peft_config(
        rank,
        alpha,
        target_modules=names,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fan_in_fan_out=any(site.transposed for site in chosen),
        **config,
    )
    tensors = AdapterTensors.build(fields, sites)
    write_peft(folder, tensors)
    if record:
        write_base_record(folder, model, tensors.sites)
    return folder


@torch.no_grad()
def peft_logits(model: nn.Module, folder: Path) -> Tensor:
    """Logits of the model with the folder loaded by PEFT; the model is put back."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, str(folder))
    try:
        wrapped.eval()
        found: Tensor = wrapped(input_ids=IDS).logits
        return found.clone()
    finally:
        wrapped.unload()


@torch.no_grad()
def our_logits(model: nn.Module, folder: Path) -> Tensor:
    import loramux

    handle = loramux.load(model, folder)
    try:
        found: Tensor = model(input_ids=IDS).logits
        return found.clone()
    finally:
        handle.detach()


@torch.no_grad()
def added_logits(model: PreTrainedModel, changes: dict[str, Tensor]) -> Tensor:
    """Logits with dense changes [d_out, d_in] added to the base's own weights for one call."""
    before = {}
    try:
        for path, change in changes.items():
            module = model.get_submodule(path)
            weight = module.get_parameter("weight")
            before[path] = weight.detach().clone()
            fits = isinstance(module, nn.Linear)
            weight.add_(change.to(weight.dtype) if fits else change.T.to(weight.dtype))
        found: Tensor = model(input_ids=IDS).logits
        return found.clone()
    finally:
        for path, weight in before.items():
            model.get_submodule(path).get_parameter("weight").copy_(weight)
