"""The two databases that the Qdrant index is tested against: qdrant-client's local mode, and Qdrant's own engine.

Why both: local mode is a re-implementation in Python without payload indexes or HNSW; the engine is what a server runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

DATABASES = ("local", "engine")


def database(kind: str, folder: Path) -> Any:
    """A client of an empty database. The engine indexes a few hundred vectors already, once told to optimize."""
    if kind == "local":
        from qdrant_client import QdrantClient

        return QdrantClient(":memory:")
    pytest.importorskip("qdrant_edge", reason="qdrant-edge-py, Qdrant's engine, is not installed")
    from loramux.bench.qdrant_edge import EdgeClient

    return EdgeClient(folder, indexing_kb=1, full_scan_kb=1)
