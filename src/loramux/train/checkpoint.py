"""States a run can go on from: folders that are whole or not there, never pickled, the last two kept.

Why hashes in a manifest: a rename is atomic, but a full disk or a copy that broke off leaves files that look right. A
state that does not match its manifest is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from loramux.errors import LoramuxError

log = logging.getLogger(__name__)
KEEP = 2
MANIFEST, META = "manifest.json", "run.json"
VERSION = 1
Tensors = dict[str, Tensor]


class CheckpointError(LoramuxError):
    """A run cannot go on from what is in its folder."""


class _Broken(Exception):
    """This state is incomplete or altered."""


@dataclass(frozen=True, eq=False)
class Saved:
    """`meta` is what the trainer wrote about the run; `tensors` holds one dict per file, by its name."""

    number: int
    meta: dict[str, Any]
    tensors: dict[str, Tensors]


class CheckpointStore:
    """The folder of states of one run, numbered by round."""

    def __init__(self, folder: Path):
        self.folder = folder

    def numbers(self) -> list[int]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def save(self, number: int, meta: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        """Write a state, then drop all but the last two."""
        part = self.folder / ".part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        content = {META: json.dumps({"version": VERSION, **meta}).encode()}
        manifest: dict[str, str] = {}
        for name, group in tensors.items():
            manifest[f"{name}.safetensors"] = _write(part / f"{name}.safetensors", _packed(group))
        for name, data in content.items():
            manifest[name] = _write(part / name, data)
        _write(part / MANIFEST, json.dumps({"sha256": manifest}).encode())
        # Later ones are left over from before a fallback: this run has not been there yet.
        for stale in self.numbers():
            if stale >= number:
                shutil.rmtree(self._path(stale))
        os.replace(part, self._path(number))
        for old in self.numbers()[:-KEEP]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def newest(self) -> Saved | None:
        """The last state that is whole; passes over broken ones with a warning."""
        for number in reversed(self.numbers()):
            try:
                return self._read(number)
            except _Broken as error:
                log.warning(
                    "%s cannot be used (%s); falling back to the state before it",
                    self._path(number),
                    error,
                )
        return None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _read(self, number: int) -> Saved:
        path = self._path(number)
        try:
            manifest = json.loads(_bytes(path / MANIFEST))["sha256"]
            data = {name: _bytes(path / name) for name in manifest}
        except (ValueError, KeyError, TypeError) as error:
            raise _Broken(f"no readable manifest: {error}") from None
        for name, want in manifest.items():
            if hashlib.sha256(data[name]).hexdigest() != want:
                raise _Broken(f"{name} is truncated or was changed")
        meta = json.loads(data.pop(META))
        if meta.get("version") != VERSION:
            raise CheckpointError(
                f"{path} was written by another version of loramux (state version {meta.get('version')}, this one "
                f"reads {VERSION}); finish the run with that version or start anew in another folder"
            )
        tensors = {
            name.removesuffix(".safetensors"): safetensors.torch.load(d) for name, d in data.items()
        }
        return Saved(number, meta, tensors)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )


def _write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _Broken(f"{path.name} is missing") from None


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, one line per key: `training.steps: 80 there, 40 here`."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = [*saved, *(key for key in now if key not in saved)]
        return [
            line
            for key in keys
            for line in differences(
                saved.get(key), now.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if saved == now else [f"{path}: {_short(saved)} there, {_short(now)} here"]


def refuse_other(saved: Any, now: Any, where: Path) -> None:
    """Raise unless the run in the folder is this very one."""
    found = differences(saved, now)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(
            f"{where} holds a run of another recipe ({'; '.join(found[:5])}{more}). "
            "Put the recipe back to go on with it, or start anew: choose another folder, or remove this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
