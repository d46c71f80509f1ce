"""A tiny base in a folder, adapters that make it say a token of their own, and a real registry over it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.bench.markers import Marked, build_base, write_marked
from loramux.registry import Registry, Version
from loramux.registry.checks import BaseShape, base_shape, check_upload, from_folder
from pico import pico_tokenizer

NUM_MARKERS = 32  # the tokenizer's ids fit beside the 64 words
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class World:
    """A base folder, what uploads are checked against, and marked adapters by (name, version)."""

    base: Path
    shape: BaseShape
    marked: dict[tuple[str, int], Marked]

    def folder(self, name: str, version: int = 0) -> Path:
        return self.marked[name, version].folder

    def marker(self, name: str, version: int = 0) -> int:
        """The token that this content makes the base say."""
        return self.marked[name, version].marker

    def publish(
        self, registry: Registry, name: str, version: int = 0, tenant: str = "local", **more: Any
    ) -> Version:
        with check_upload(from_folder(self.folder(name, version)), self.shape) as checked:
            return registry.publish(checked, tenant=tenant, name=name, actor="test", **more)


def make_world(root: Path, names: Sequence[str] = ("law", "tone"), versions: int = 2) -> World:
    model = build_base(NUM_MARKERS)
    base = root / "base"
    model.save_pretrained(base)
    pico_tokenizer().save_pretrained(base)
    found = write_marked(model, root / "adapters", names, versions)
    marked = {(each.name, each.version): each for each in found}
    return World(base, base_shape(base), marked)


def zipped(folder: Path, **more: bytes) -> bytes:
    """The folder as an archive, with further members."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in FILES:
            archive.write(folder / name, name)
        for name, content in more.items():
            archive.writestr(name, content)
    return data.getvalue()
