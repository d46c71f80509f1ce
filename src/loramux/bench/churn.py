"""Adapters loaded, used once and unloaded, thousands of times: what is gone must not stay in memory."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.bench.markers import build_base, write_marked
from loramux.bench.progress import Advance
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams

STATM = Path("/proc/self/statm")
WARM = 0.2  # of the cycles pass before memory is looked at: caches and the allocator fill up first
ADAPTERS = 5  # of ranks 1 to 16
MOST_MB = 8.0


@dataclass(frozen=True)
class Churn:
    """grown_mb: how much more memory the process holds after all cycles than after the first fifth of them."""

    cycles: int
    grown_mb: float | None
    left: tuple[int, ...]

    @property
    def problems(self) -> list[str]:
        found = []
        if self.grown_mb is not None and self.grown_mb > MOST_MB:
            found.append(f"{self.cycles} loads and unloads left {self.grown_mb:.1f} MB behind")
        if any(self.left):
            found.append(f"blocks, contents, leases and slots still held: {self.left}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"cycles": self.cycles, "grown_mb": self.grown_mb, "problems": self.problems}


def churn(cycles: int, root: Path, advance: Advance | None = None) -> Churn:
    """Every cycle registers an adapter under a new name, answers a request with it and removes it."""
    base = build_base(ADAPTERS)
    contents = write_marked(base, root, [f"load-{i}" for i in range(ADAPTERS)], 1)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    before: float | None = None
    with Engine(base, kv_memory="1MiB", max_slots=4) as engine:
        for cycle in range(cycles):
            if cycle == int(cycles * WARM):
                before = resident_mb()
            content = contents[cycle % ADAPTERS]
            name = f"cycle-{cycle}"
            engine.add_adapter(name, content.folder)
            request = Request(prompt=[1, 2, 3, cycle % 50], adapter=name, params=params)
            ((done,),) = engine.generate([request])
            if done.token_ids != (content.marker,) * 2:
                raise AssertionError(f"cycle {cycle} answered {done}")
            engine.remove_adapter(name)
            if advance is not None:
                advance()
        after = resident_mb()
        engine.check_integrity()
        stats = engine.store.stats()
        held = engine.blocks.num_blocks - engine.blocks.num_free
        left = (held, stats.num_contents, stats.num_leases, stats.num_slots_used)
    grown = None if before is None or after is None else after - before
    return Churn(cycles, grown, left)


def resident_mb() -> float | None:
    """What the process holds in memory; None where the system does not say."""
    gc.collect()
    if not STATM.exists():
        return None
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
