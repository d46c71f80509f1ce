"""New adapters out of trained ones, without training: lower ranks, other scales, fewer linears, weighted mixes.

Why: a demonstration of many tenants needs many different adapters in minutes. Each result is an ordinary PEFT folder
that stands for itself; a note in it says how it was made and from which contents.

Letters: R rank rows, I input width, O output width, K rows that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux.formats.errors import FormatError
from loramux.formats.jsonio import read_json_object, write_json
from loramux.formats.peft import peft_config, site_scaling, write_peft
from loramux.formats.scaling import target_names
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.persist.base import write_base_record

NOTE = "derived.json"
DTYPE = torch.bfloat16  # of what is written; sums and factorisations are done in fp32

Scaled = dict[str, tuple[Tensor, Tensor]]  # module path -> A [R, I], B [R, O], scale folded into B


def truncated(adapter: AdapterTensors, rank: int) -> Scaled:
    """The nearest adapter of a lower rank, in the sense of least squares, at every site."""
    return {path: _truncate(a_RI, b_RO, rank) for path, (a_RI, b_RO) in folded(adapter).items()}


def scaled(adapter: AdapterTensors, factor: float) -> Scaled:
    """The same directions, `factor` times as strong."""
    return {path: (a_RI, factor * b_RO) for path, (a_RI, b_RO) in folded(adapter).items()}


def restricted(adapter: AdapterTensors, paths: Collection[str]) -> Scaled:
    """Only the rows of these sites."""
    return {path: rows for path, rows in folded(adapter).items() if path in paths}


def mixed(adapters: Sequence[AdapterTensors], weights: Sequence[float]) -> Scaled:
    """The weighted sum: ranks side by side, so nothing is lost."""
    parts = [scaled(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    paths = dict.fromkeys(path for part in parts for path in part)
    return {
        path: (
            torch.cat([part[path][0] for part in parts if path in part]),
            torch.cat([part[path][1] for part in parts if path in part]),
        )
        for path in paths
    }


def folded(adapter: AdapterTensors) -> Scaled:
    """Rows in fp32 with scale 1."""
    ranks = {path: site.rank for path, site in adapter.sites.items()}
    scales = site_scaling(adapter.config, ranks)
    return {
        path: (site.a.float(), scales[path][2] * site.b.float())
        for path, site in adapter.sites.items()
    }


def derive(
    folder: Path,
    model: Any,
    how: str,
    sources: Sequence[AdapterTensors],
    make: Callable[[], Scaled],
) -> bool:
    """Make an adapter unless the folder holds it already, made in this way from these contents; whether it was made."""
    note = {"how": how, "sources": [source.digest for source in sources]}
    if _note_of(folder) == note:
        return False
    rows = make()
    sites = {path: SiteTensors(a.to(DTYPE), b.to(DTYPE)) for path, (a, b) in rows.items()}
    ranks = {site.rank for site in sites.values()}
    assert len(ranks) == 1, f"one rank at all sites, got {sorted(ranks)}"
    rank = ranks.pop()
    others = [path for source in sources for path in source.sites if path not in sites]
    config = peft_config(
        rank,
        rank,
        target_modules=target_names(sites, others),
        fan_in_fan_out=bool(sources[0].config.get("fan_in_fan_out")),
        base_model_name_or_path=sources[0].config.get("base_model_name_or_path"),
    )
    (folder / NOTE).unlink(missing_ok=True)
    write_peft(folder, AdapterTensors.build(config, sites))
    write_base_record(folder, model, sites)
    write_json(folder / NOTE, note)  # last: an interrupted one is made again
    return True


def _note_of(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(folder / NOTE)
    except FormatError:
        return None


def _truncate(a_RI: Tensor, b_RO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # B^T A = Qb (Rb Ra^T) Qa^T: the singular values of an R x R matrix are those of the whole product.
    qa_IR, ra_RR = torch.linalg.qr(a_RI.T)
    qb_OR, rb_RR = torch.linalg.qr(b_RO.T)
    u_RR, s_R, vh_RR = torch.linalg.svd(rb_RR @ ra_RR.T)
    root_K1 = s_R[:rank].sqrt()[:, None]
    a_KI = root_K1 * (vh_RR[:rank] @ qa_IR.T)
    b_KO = root_K1 * (u_RR[:, :rank].T @ qb_OR.T)
    return a_KI.contiguous(), b_KO.contiguous()
