"""Memory that the C library keeps for the next step instead of giving it back after each.

Why: a training step allocates the same activations again and again. glibc returns large blocks to the kernel when they
are freed, and the kernel hands them back page by page, zeroed: some 190,000 page faults in a step of eight small jobs,
a sixth of its time. Inside `keeping` freed memory stays with the process; the peak is what it was.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# From malloc.h: what mallopt sets, and what holds without it.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}
USUAL = {TRIM_THRESHOLD: 2**26, MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25}


@contextmanager
def keeping() -> Iterator[None]:
    """Inside, freed memory is kept for what comes next; at the end it is given back. Without glibc: nothing."""
    libc = _glibc()
    if libc is None:
        yield
        return
    for option, value in KEPT.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        # glibc has no way to read them: these are the values its own adaption ends at.
        for option, value in USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The process's own C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
