"""An exact index as one file: arrays in safetensors, names in JSON, nothing that could run code.

Why with its background: two machines that restore the same file give the same scores to the last bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loramux.retrieval.background import Background
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.segment import PLAIN, Segment
from loramux.retrieval.view import Block, View

if TYPE_CHECKING:
    from loramux.retrieval.exact import Similarity

_FORMAT = 1
_SEGMENT = ("starts", *PLAIN)


def write_snapshot(
    path: Path, view: View, encoder_id: str | None, dim: int | None, similarity: Similarity
) -> None:
    """Write a packed view; the file appears whole or not at all."""
    from safetensors.numpy import save

    from loramux.formats.files import write_bytes

    segment = view.whole()
    arrays: dict[str, NDArray[Any]] = {"idf": view.background.idf}
    if segment is not None:
        arrays |= {name: getattr(segment, name) for name in _SEGMENT}
        if segment.dense is not None:
            arrays["dense"] = segment.dense
    if view.background.mean is not None:
        arrays["mean"] = view.background.mean
    facts = {
        "format": _FORMAT,
        "encoder": encoder_id,
        "dim": dim,
        "similarity": similarity,
        "version": view.background.version,
        "num_profiles": view.background.num_profiles,
        "central_limit": view.background.central_limit,
        "ids": view.ids,
        "owners": view.owners,
        "marks": [[*mark, rows.tolist()] for mark, rows in sorted(view.marked.items())],
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def read_snapshot(path: Path) -> tuple[View, str | None, int | None, Similarity]:
    """The view of a snapshot, and which encoder its index was for."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        facts = json.loads(arrays.pop("facts").tobytes())
        if facts["format"] != _FORMAT:
            raise KeyError("format")
        return _view(arrays, facts), facts["encoder"], facts["dim"], facts["similarity"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RetrievalError(
            f"{path} is no snapshot of an index ({type(error).__name__}: {error}); "
            "write one with index.snapshot(path)",
            "bad_snapshot",
        ) from None


def _view(arrays: dict[str, NDArray[Any]], facts: dict[str, Any]) -> View:
    background = Background(
        facts["version"],
        arrays["idf"],
        arrays.get("mean"),
        facts["num_profiles"],
        facts["central_limit"],
    )
    ids = tuple(facts["ids"])
    blocks: tuple[Block, ...] = ()
    if ids:
        segment = Segment(dense=arrays.get("dense"), **{name: arrays[name] for name in _SEGMENT})
        if len(segment) != len(ids):
            raise ValueError(f"{len(ids)} names for {len(segment)} rows")
        blocks = (Block.of(segment, 0, background),)
    return View(
        background,
        blocks,
        ids,
        tuple(facts["owners"]),
        {id: row for row, id in enumerate(ids)},
        {(key, value): np.array(rows, np.int64) for key, value, rows in facts["marks"]},
        np.ones(len(ids), np.bool_),
    )
