"""Fusion: one ephemeral adapter from the means of the factors, y = s (mean_j B_j)(mean_j A_j) x.

Why beside Mixture: it costs one adapter per token whatever k is. It is not the mean of the adapters: the product of the
means has cross terms, which is why the paper's Fusion falls behind its Mixture as k grows.

What the paper leaves open and is settled here: unequal scales or ranks are refused unless asked for; an adapter without
some linear counts as zero there, and the others keep 1/k.

Letters: R rank rows, I input width, O output width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loramux.retrieval.errors import RetrievalError

if TYPE_CHECKING:
    from torch import Tensor

    from loramux.compose.parts import Merged, Part

PROVENANCE = "fusion.json"


def fuse(
    folders: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    fold_scales: bool = False,
    pad_ranks: bool = False,
) -> Path:
    """Write the fusion of plain PEFT folders as a PEFT folder, fp32, scale 1.

    fold_scales: unequal scales s_j are taken into both factors as sqrt(s_j). pad_ranks: smaller ranks get zero rows.
    A folder may be named several times, and counts so often.
    """
    from loramux.compose.sources import parts_at, read_sources, union
    from loramux.compose.write import joint_record, merged_tensors, write_folder

    sources = read_sources(folders)
    paths = union(sources)
    ones = [1.0] * len(sources)
    parts = {path: parts_at(sources, path, ones) for path in paths}
    if not fold_scales:
        _check_scales(parts)
    if not pad_ranks:
        _check_ranks(parts)
    merged = {path: _fused(own, len(sources), fold_scales) for path, own in parts.items()}
    facts = {
        "method": "loraretriever fusion",
        "sources": [source.given for source in sources],
        "fold_scales": fold_scales,
        "pad_ranks": pad_ranks,
    }
    write_folder(
        out, merged_tensors(sources, merged), joint_record(sources, paths), facts, PROVENANCE
    )
    return out


def fused_folder(cache: Path, parts: Mapping[str, str | os.PathLike[str]]) -> tuple[str, Path]:
    """The fusion of {digest: folder}, made once: its id and its folder under `cache`.

    The order of the parts does not matter. Scales and ranks must be equal, as in `fuse`.
    """
    if not parts:
        raise RetrievalError("nothing to fuse: no adapter was given")
    name = fusion_id(parts)
    folder = cache / name
    if not (folder / PROVENANCE).is_file():
        fuse([parts[digest] for digest in sorted(parts)], folder)
    return name, folder


def fusion_id(digests: Sequence[str] | Mapping[str, object]) -> str:
    """Names the fusion of these contents."""
    return hashlib.sha256("\n".join(["fusion", *sorted(digests)]).encode()).hexdigest()


def _fused(parts: Sequence[Part], k: int, fold_scales: bool) -> Merged:
    import torch

    from loramux.compose.parts import Merged

    rank = max(part.rank for part in parts)
    a_RI = torch.stack([_grown(p.a, rank) * _folded(p, fold_scales) for p in parts]).sum(0) / k
    b_RO = torch.stack([_grown(p.b, rank) * _folded(p, fold_scales) for p in parts]).sum(0) / k
    return Merged(a_RI, b_RO if fold_scales else parts[0].scale * b_RO)


def _folded(part: Part, fold_scales: bool) -> float:
    return part.scale**0.5 if fold_scales else 1.0


def _grown(rows: Tensor, rank: int) -> Tensor:
    import torch

    return torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))


def _check_scales(parts: Mapping[str, Sequence[Part]]) -> None:
    for path, own in parts.items():
        scales = sorted({part.scale for part in own})
        if len(scales) > 1:
            raise RetrievalError(
                f"the adapters have different scales at {path}: {scales}; a mean of factors has one scale. Use "
                "Mixture, or fold_scales=True to take sqrt(scale) into both factors",
                "unequal_scales",
            )
    if any(part.scale < 0 for own in parts.values() for part in own):
        raise RetrievalError("an adapter of negative scale has no square root to fold in")


def _check_ranks(parts: Mapping[str, Sequence[Part]]) -> None:
    for path, own in parts.items():
        ranks = sorted({part.rank for part in own})
        if len(ranks) > 1:
            raise RetrievalError(
                f"the adapters have different ranks at {path}: {ranks}; their rows cannot be averaged one by one. Use "
                "Mixture, or pad_ranks=True to fill up with zero rows",
                "unequal_ranks",
            )
