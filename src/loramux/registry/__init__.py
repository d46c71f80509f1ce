"""Adapters of many contributors: stored by content, named by tenants, checked before anything is kept.

The names below are imported when first used: the upload checks (`loramux.registry.checks`) and names
(`loramux.registry.names`) work without a database installed.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "CollectReport": "types",
    "Conflict": "errors",
    "Corrupt": "errors",
    "FileEntry": "types",
    "FsckReport": "types",
    "NotFound": "errors",
    "Registry": "store",
    "RegistryError": "errors",
    "Score": "types",
    "StorageError": "errors",
    "Version": "types",
}

__all__ = [
    "CollectReport",
    "Conflict",
    "Corrupt",
    "FileEntry",
    "FsckReport",
    "NotFound",
    "Registry",
    "RegistryError",
    "Score",
    "StorageError",
    "Version",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
