"""Small adapters as files and as tensors, for the tests of this folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramux.formats.scaling import peft_config
from loramux.formats.tensors import AdapterTensors, SiteTensors

WIDTHS = {"q_proj": (6, 8), "down_proj": (10, 6)}
PATHS = {
    f"model.layers.{layer}.{block}.{name}": WIDTHS[name]
    for layer in (0, 1)
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj"))
}


def rows(rank: int, d_in: int, d_out: int, seed: int = 0, dora: bool = False) -> SiteTensors:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rank, width, generator=generator) for width in (d_in, d_out))
    return SiteTensors(a, b, torch.rand(d_out, generator=generator) + 0.5 if dora else None)


def adapter(
    rank: int = 2,
    seed: int = 0,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> AdapterTensors:
    sites = {
        path: rows(rank, *widths, seed=seed * 100 + index, dora=dora)
        for index, (path, widths) in enumerate(PATHS.items())
    }
    sites = {
        path: SiteTensors(
            site.a.to(dtype),
            site.b.to(dtype),
            None if site.magnitude is None else site.magnitude.to(dtype),
        )
        for path, site in sites.items()
    }
    fields = {"target_modules": list(WIDTHS), "use_dora": dora} | config
    return AdapterTensors.build(peft_config(rank, 4, **fields), sites)


def edit_config(folder: Path, name: str = "adapter_config.json", **changes: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(
    folder: Path,
    change: Callable[[dict[str, Tensor]], object],
    name: str = "adapter_model.safetensors",
) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def same_tensors(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Same names in any order, same dtypes, same bits."""
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
