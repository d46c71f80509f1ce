"""Whether an adapter's folder is still what was read: the identity of its files.

Why not mtimes alone: a file of the same size can be put in place within one tick of the clock, or with its old time set
back. Size, inode, mtime and ctime together change with every write that comes after the tick in which they were noted.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from loramux.formats.mixlora import NAMES
from loramux.formats.mixture import ROUTER_NAME
from loramux.formats.mixture_header import EXPERTS_NAME
from loramux.formats.peft import CONFIG_NAME, MIXTURE_NAME, WEIGHTS_NAME
from loramux.persist.base import RECORD

TICK_S = 0.02  # no file system clock that is in use is coarser

Identity = tuple[tuple[str, int, int, int, int], ...]

_TOP = (CONFIG_NAME, WEIGHTS_NAME, *NAMES[1][:2], RECORD, MIXTURE_NAME, ROUTER_NAME)
_OF_EXPERT = (CONFIG_NAME, WEIGHTS_NAME)


def identity_of(folder: Path) -> Identity:
    """(name, size, inode, mtime, ctime) of every file a reader would open; empty where there is none."""
    root = str(folder)
    found = [entry for name in _TOP if (entry := _facts(root, name)) is not None]
    if any(entry[0] == MIXTURE_NAME for entry in found):
        for expert in _names(os.path.join(root, EXPERTS_NAME)):
            for name in _OF_EXPERT:
                facts = _facts(root, f"{EXPERTS_NAME}/{expert}/{name}")
                if facts is not None:
                    found.append(facts)
    return tuple(found)


def weight_bytes(identity: Identity) -> int:
    """Bytes of the files that hold tensors."""
    return sum(entry[1] for entry in identity if entry[0].endswith(".safetensors"))


def settle(identity: Identity) -> None:
    """Wait, for files written this instant, until any later change must show in their identity."""
    newest = max((entry[4] for entry in identity), default=0) / 1e9
    left = newest + TICK_S - time.time()
    if 0 < left <= TICK_S:
        time.sleep(left)


def _facts(root: str, name: str) -> tuple[str, int, int, int, int] | None:
    try:
        info = os.stat(os.path.join(root, name))
    except (OSError, ValueError):
        return None
    return name, info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
