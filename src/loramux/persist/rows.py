"""Rank rows at the model's sites from the adapters in a folder: which sites, which slots, which scales.

An expert per folder is a slot per folder; a mixture whose experts are single ranks is one folder, cut by its method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loramux.core.bank import Rows
from loramux.core.method import Method
from loramux.core.types import Site
from loramux.formats.errors import OTHER_BASE, FormatError
from loramux.formats.scaling import site_scaling
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.ops.contract import Spans


def match_sites(sites: Sequence[Site], tensors: AdapterTensors, where: str) -> dict[str, Site]:
    """The model's sites an adapter names, in declared order; refuses missing modules and other shapes."""
    by_path = {site.path: site for site in sites}
    missing = [path for path in tensors.sites if path not in by_path]
    if missing:
        raise FormatError(
            f"{where} targets {missing[:3]}{' ...' if len(missing) > 3 else ''}, which this model does not have as a "
            f"linear of a decoder layer; it was trained on another base. This one has "
            f"{sorted({s.name for s in sites})}",
            code=OTHER_BASE,
        )
    for path, entry in tensors.sites.items():
        site = by_path[path]
        if (entry.d_in, entry.d_out) != (site.d_in, site.d_out):
            raise FormatError(
                f"{where}: {path} is {entry.d_in} -> {entry.d_out} in the adapter and {site.d_in} -> {site.d_out} in "
                "this model; it was trained on another base",
                code=OTHER_BASE,
            )
    return {site.path: site for site in sites if site.path in tensors.sites}


def all_sites(sites: Sequence[Site], experts: Mapping[str, AdapterTensors]) -> dict[str, Site]:
    """The model's sites that any of the experts names."""
    touched: set[str] = set()
    for name, expert in experts.items():
        touched |= match_sites(sites, expert, name).keys()
    return {site.path: site for site in sites if site.path in touched}


def stack_experts(
    sites: Mapping[str, Site], experts: Sequence[AdapterTensors], where: str
) -> dict[str, Rows]:
    """Rows per site with one slot per expert, in order; an expert that leaves a site out gets rank 0 there."""
    scales = file_scales(experts, where)
    return {path: _stack(site, experts, scales, where) for path, site in sites.items()}


def method_rows(
    sites: Mapping[str, Site], experts: Mapping[str, AdapterTensors], method: Method, where: str
) -> dict[str, Rows]:
    """Rows of a mixture that was trained as one, checked against what its method allocates."""
    if method.folder_layout == "one":
        (ranks,) = experts.values()
        return _cut(sites, ranks, method, where)
    every = list(experts.values())
    scales = file_scales(every, where)
    rows = {}
    for path, site in sites.items():
        here = [i for i, expert in enumerate(every) if path in expert.sites]
        want = len(method.experts(site))
        if len(here) != want:
            raise FormatError(f"{path} has {len(here)} experts, its config asks for {want}")
        own = _stack(site, [every[i] for i in here], [scales[i] for i in here], where)
        rows[path] = _tied(own, method.tied_experts(site), path, where)
    return rows


def file_scales(experts: Sequence[AdapterTensors], where: str) -> list[dict[str, float]]:
    """The scale of every site, one mapping per expert."""
    found = [
        site_scaling(
            expert.config, {path: entry.rank for path, entry in expert.sites.items()}, where
        )
        for expert in experts
    ]
    return [{path: entry[2] for path, entry in scaling.items()} for scaling in found]


def _stack(
    site: Site, experts: Sequence[AdapterTensors], scales: Sequence[Mapping[str, float]], where: str
) -> Rows:
    path = site.path
    parts = [e.sites.get(path) for e in experts]
    spans = Spans.packed(
        [0 if p is None else p.rank for p in parts],
        [1.0 if p is None else s[path] for p, s in zip(parts, scales, strict=True)],
    )
    present = [p for p in parts if p is not None]
    magnitudes = [p.magnitude for p in present if p.magnitude is not None]
    if magnitudes and len(magnitudes) != len(parts):
        raise FormatError(f"{where}: at {path} some experts are DoRA and some are not")
    rows = Rows(
        spans,
        _joined([p.a for p in present]),
        _joined([p.b for p in present]),
        torch.stack(magnitudes) if magnitudes else None,
    )
    assert rows.a.shape[1] == site.d_in
    return rows


def _cut(
    sites: Mapping[str, Site], tensors: AdapterTensors, method: Method, where: str
) -> dict[str, Rows]:
    """The rows of one folder as the slots its method has at every site."""
    (scales,) = file_scales([tensors], where)
    rows = {}
    for path, site in sites.items():
        entry, experts = tensors.sites[path], method.experts(site)
        spans = Spans.packed([e.rank for e in experts], [e.scale for e in experts])
        if entry.rank != spans.num_rows:
            raise FormatError(
                f"{where}: {path} has {entry.rank} rank rows, its config asks for {spans.num_rows}; restore "
                "mixture_config.json"
            )
        other = [s for s in spans.scale if abs(s - scales[path]) > 1e-9 * max(1.0, s)]
        if other:
            raise FormatError(
                f"{where}: {path} is scaled with {scales[path]:g} in its folder and with {other[0]:g} in the mixture's "
                "config; restore mixture_config.json"
            )
        if entry.magnitude is not None:
            raise FormatError(f"{where}: {path} is DoRA, which single ranks cannot be")
        rows[path] = Rows(spans, entry.a.contiguous(), entry.b.contiguous())
    return rows


def _tied(rows: Rows, num: int, path: str, where: str) -> Rows:
    """The rows with the A that `num` experts share kept once; their folders must hold equal copies of it."""
    if not num:
        return rows
    first = rows.a.detach()[rows.slot_rows(0)]
    slots = range(rows.spans.num_slots)
    if any(not _equal(rows.a.detach()[rows.slot_rows(slot)], first) for slot in slots):
        raise FormatError(
            f"{where}: at {path} the experts have different A, but this method's experts share one; the folders belong "
            "to different mixtures"
        )
    return Rows(rows.spans, first.clone(), rows.b.detach(), rows.magnitude, tied=num)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts)).contiguous()


def row_tensors(rows: Rows) -> list[tuple[SiteTensors, float] | None]:
    """Every slot of these rows as a file holds it, with its scale; None for one of rank 0. Gates are folded in."""
    plain = rows.folded()
    a, b, magnitude = plain.a.detach(), plain.b.detach(), plain.magnitude
    return [
        (
            SiteTensors(
                a[plain.slot_rows(slot)],
                b[plain.slot_rows(slot)],
                None if magnitude is None else magnitude.detach()[slot],
            ),
            plain.spans.scale[slot],
        )
        if plain.spans.rank[slot]
        else None
        for slot in range(plain.spans.num_slots)
    ]


def joined_row_tensors(rows: Rows, path: str) -> tuple[SiteTensors, float] | None:
    """All slots of these rows as one adapter, with the scale they share; None if there is no row."""
    plain = rows.folded()
    spans = plain.spans
    scales = {s for s, r in zip(spans.scale, spans.rank, strict=True) if r}
    if not scales:
        return None
    if len(scales) > 1 or (plain.magnitude is not None and spans.num_slots > 1):
        raise ValueError(
            f"the ranks at {path} have several scales or DoRA magnitudes ({sorted(scales)}), so no one PEFT folder "
            'can hold them; its method needs folder_layout = "experts"'
        )
    order = torch.cat(
        [torch.arange(spans.num_rows)[plain.slot_rows(s)] for s in range(spans.num_slots)]
    )
    a, b = plain.a.detach(), plain.b.detach()
    magnitude = None if plain.magnitude is None else plain.magnitude.detach()[0]
    return SiteTensors(a[order.to(a.device)], b[order.to(b.device)], magnitude), scales.pop()
