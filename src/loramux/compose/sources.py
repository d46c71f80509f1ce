"""The adapters to merge, read and checked: plain LoRAs of one base, or a refusal that says why.

What PEFT lets through and must not come through here: DoRA and biases on B (no sum of ranks), rsLoRA and patterns read
as if they were alpha / r, adapters of other bases, linears that only some adapters have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux.compose.parts import WIDE, Part
from loramux.core.frozen import expert_names
from loramux.errors import LoramuxError
from loramux.formats.jsonio import read_json_object
from loramux.formats.mixture import is_mixture
from loramux.formats.peft import read_peft
from loramux.formats.scaling import site_scaling
from loramux.formats.tensors import AdapterTensors, natural_order
from loramux.persist.base import RECORD


@dataclass(frozen=True, eq=False)
class Source:
    """One input: its tensors, its scale at every linear, and what its folder notes about the base."""

    name: str
    given: str  # the path as the user wrote it
    tensors: AdapterTensors
    scales: dict[str, float]
    record: dict[str, Any]

    def part(self, path: str, weight: float) -> Part:
        site = self.tensors.sites[path]
        return Part(_wide(site.a), _wide(site.b), self.scales[path], weight)

    @property
    def ranks(self) -> dict[str, int]:
        return {path: site.rank for path, site in self.tensors.sites.items()}


def read_sources(folders: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Read every folder; refuses what cannot be merged as a sum of ranks, and adapters of different bases."""
    if not folders:
        raise LoramuxError("no adapter was given; name at least one folder of a saved adapter")
    given = [os.fspath(folder) for folder in folders]
    sources = [_read(name, text) for name, text in zip(_names(given), given, strict=True)]
    _check_shapes(sources)
    _check_bases(sources)
    return sources


def _names(given: Sequence[str]) -> list[str]:
    try:
        return list(expert_names([os.path.abspath(text) for text in given]))
    except ValueError:  # one folder named twice
        return [f"{Path(text).name}-{number}" for number, text in enumerate(given)]


def _read(name: str, given: str) -> Source:
    folder = Path(given)
    if not folder.is_dir():
        raise LoramuxError(f"no adapter folder at {given!r}; give the folder of a saved adapter")
    if is_mixture(folder):
        raise LoramuxError(
            f"{given} is a mixture with a router, not one adapter; merge folders of its experts/, or make a plain "
            "adapter of it for one prompt or task with `loramux lower`"
        )
    tensors = read_peft(folder)
    if tensors.config.get("use_dora"):
        raise LoramuxError(
            f"{given} is a DoRA adapter: its change of a weight is not a sum of ranks but depends on the base's norms, "
            "so it cannot be merged from the adapters alone; re-train with use_dora=false"
        )
    ranks = {path: site.rank for path, site in tensors.sites.items()}
    scales = {path: entry[2] for path, entry in site_scaling(tensors.config, ranks, given).items()}
    record = folder / RECORD
    return Source(
        name, given, tensors, scales, read_json_object(record) if record.is_file() else {}
    )


def union(sources: Sequence[Source]) -> list[str]:
    """Every linear that one of the adapters has, layer by layer."""
    return sorted({path for s in sources for path in s.tensors.sites}, key=natural_order)


def parts_at(sources: Sequence[Source], path: str, weights: Sequence[float]) -> list[Part]:
    """The adapters that have this linear, in order."""
    return [
        source.part(path, weight)
        for source, weight in zip(sources, weights, strict=True)
        if path in source.tensors.sites
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", WIDE)


def _check_shapes(sources: Sequence[Source]) -> None:
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for source in sources:
        for path, site in source.tensors.sites.items():
            shape = (site.d_in, site.d_out)
            first, whose = seen.setdefault(path, (shape, source.given))
            if shape != first:
                raise LoramuxError(
                    f"{path} is {first[0]} -> {first[1]} in {whose} and {shape[0]} -> {shape[1]} in {source.given}; "
                    "only adapters of one base can be merged"
                )


def _check_bases(sources: Sequence[Source]) -> None:
    """Compare what the folders note about their bases; folders of other tools note nothing."""
    first_of: dict[str, tuple[str, str]] = {}
    for source in sources:
        for what, digest in base_marks(source).items():
            known, whose = first_of.setdefault(what, (digest, source.given))
            if digest != known:
                raise LoramuxError(
                    f"{whose} and {source.given} were trained on different bases "
                    f"({_base_name(sources, whose)} and {_base_name(sources, source.given)}: the weights of "
                    f"{what.split(' ')[0]} differ); only adapters of one base can be merged"
                )


def base_marks(source: Source) -> dict[str, str]:
    """Digests of the base that can be compared with another adapter's: per linear, and of all targeted linears."""
    sites = source.record.get("base_sites")
    marks = (
        {str(path): str(mark) for path, mark in sites.items()} if isinstance(sites, dict) else {}
    )
    sample = source.record.get("base_sample")
    if isinstance(sample, str):
        paths = sorted(source.tensors.sites)
        marks[f"{paths[0]} and {len(paths) - 1} more linears: {' '.join(paths)}"] = sample
    return marks


def _base_name(sources: Sequence[Source], given: str) -> str:
    source = next(s for s in sources if s.given == given)
    name = source.record.get("base_name") or source.tensors.config.get("base_model_name_or_path")
    return str(name or "unnamed")


def one_value(values: Sequence[Any], otherwise: Any = None) -> Any:
    """The value all agree on."""
    return values[0] if values and all(value == values[0] for value in values) else otherwise


def fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
