"""Uploads that passed the checks, without the checks: what the registry reads of a `Checked`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.registry import Registry, Version

BASE = "b" * 64


@dataclass(frozen=True)
class Staged:
    path: str
    sha256: str
    num_bytes: int
    staged: Path


@dataclass(frozen=True)
class Upload:
    files: tuple[Staged, ...]
    digest: str
    base_digest: str | None = BASE
    method: str = "lora"
    servability: str = "static"
    max_rank: int = 8
    num_bytes: int = 0


def upload(
    folder: Path, content: str, *, base: str | None = BASE, shared_file: str = "{}"
) -> Upload:
    """Two files: a config of which many uploads have the same, and weights that say `content`."""
    texts = {"adapter_config.json": shared_file, "adapter_model.safetensors": content}
    files = tuple(stage(folder, path, text.encode()) for path, text in texts.items())
    digest = sha(f"{shared_file}\0{content}".encode())
    total = sum(file.num_bytes for file in files)
    return Upload(files=files, digest=digest, base_digest=base, num_bytes=total)


def stage(folder: Path, path: str, data: bytes) -> Staged:
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / sha(path.encode() + data)
    staged.write_bytes(data)
    return Staged(path, sha(data), len(data), staged)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(registry: Registry, folder: Path, content: str, name: str = "sums", **more: Any) -> Version:
    """Publish in one line, for tests about something else."""
    more = {"tenant": "ann", "actor": "tester", **more}
    base = more.pop("base", BASE)
    return registry.publish(upload(folder / "staged", content, base=base), name=name, **more)
