"""Which adapters fit a prompt.

Why lazy names: the lexical half needs neither torch nor a database, and importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.retrieval.background import Background, Query
    from loramux.retrieval.calibrate import (
        AbstainAt,
        Calibration,
        Threshold,
        abstain_threshold,
        calibrated_threshold,
    )
    from loramux.retrieval.encoder import Encoder, MiniLM
    from loramux.retrieval.errors import EncoderError, ProfileError, RetrievalError
    from loramux.retrieval.exact import ExactIndex
    from loramux.retrieval.following import Follower, follow
    from loramux.retrieval.fusing import fuse, fused_folder
    from loramux.retrieval.index import Entry, Index
    from loramux.retrieval.profile import Profile, make_profile
    from loramux.retrieval.qdrant import QdrantIndex
    from loramux.retrieval.rank import Ranking
    from loramux.retrieval.retriever import Hit, Retrieved, Retriever
    from loramux.retrieval.store import ProfileStore
    from loramux.retrieval.weighing import mapping, weights
    from loramux.retrieval.where import EVERYTHING, Where

_WHERE = {
    "background": ("Background", "Query"),
    "calibrate": (
        "AbstainAt",
        "Calibration",
        "Threshold",
        "abstain_threshold",
        "calibrated_threshold",
    ),
    "encoder": ("Encoder", "MiniLM"),
    "errors": ("EncoderError", "ProfileError", "RetrievalError"),
    "exact": ("ExactIndex",),
    "following": ("Follower", "follow"),
    "fusing": ("fuse", "fused_folder"),
    "index": ("Entry", "Index"),
    "profile": ("Profile", "make_profile"),
    "qdrant": ("QdrantIndex",),
    "rank": ("Ranking",),
    "retriever": ("Hit", "Retrieved", "Retriever"),
    "store": ("ProfileStore",),
    "weighing": ("mapping", "weights"),
    "where": ("EVERYTHING", "Where"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "EVERYTHING",
    "AbstainAt",
    "Background",
    "Calibration",
    "Encoder",
    "EncoderError",
    "Entry",
    "ExactIndex",
    "Follower",
    "Hit",
    "Index",
    "MiniLM",
    "Profile",
    "ProfileError",
    "ProfileStore",
    "QdrantIndex",
    "Query",
    "Ranking",
    "RetrievalError",
    "Retrieved",
    "Retriever",
    "Threshold",
    "Where",
    "abstain_threshold",
    "calibrated_threshold",
    "follow",
    "fuse",
    "fused_folder",
    "make_profile",
    "mapping",
    "weights",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = found
    return found
