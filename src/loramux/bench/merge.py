"""How long merging a pair of adapters takes at one large linear, what rank is kept and what is lost.

    python -m loramux.bench.merge [--width 4096] [--rank 64] [--threads 1 2] [--rounds 3] [--json FILE]

Random factors: the worst case for whatever cuts the rank, since no entry or direction stands out. The time is that of
the merge and of its error, from factors in memory to factors in memory; the first run is not counted (it imports).
Beside it stands the processor time of all threads, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loramux.compose.algebra import distance, norm, stack
from loramux.compose.mergers import load_merger, merger_names
from loramux.compose.parts import WIDE, Part

TARGETS = {"cat": 1.0, "svd": 1.0, "ties": 4.0}  # seconds, at 4096 and rank 64


def random_pair(width: int, rank: int, seed: int = 0) -> list[Part]:
    """Two adapters of a square linear, alpha = 2 r."""
    made = torch.Generator().manual_seed(seed)
    bound = width**-0.5
    return [
        Part(
            torch.randn(rank, width, generator=made).to(WIDE) * bound,
            torch.randn(rank, width, generator=made).to(WIDE) * bound,
            scale=2.0,
            weight=0.5,
        )
        for _ in range(2)
    ]


@torch.no_grad()
def measure(name: str, parts: Sequence[Part], rounds: int) -> dict[str, Any]:
    """Median and range of the seconds, the rank and the errors of one method."""
    merger = load_merger(name)
    options = merger.options()
    made = merger.merge(parts, options, 0)
    seconds, busy = [], []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        made = merger.merge(parts, options, 0)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    summed = stack(parts)
    return {
        "method": name,
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "cpu_seconds": statistics.median(busy),
        "target": TARGETS.get(name),
        "rank": made.rank,
        "error": made.error,
        "distance": distance((made.a, made.b), summed) / norm(*summed) if merger.sums else None,
    }


def measure_all(
    names: Sequence[str], width: int, rank: int, threads: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Every method with every number of threads; torch's setting is put back."""
    parts = random_pair(width, rank)
    before = torch.get_num_threads()
    rows = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            rows += [{"threads": count, **measure(name, parts, rounds)} for name in names]
    finally:
        torch.set_num_threads(before)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a target is missed at the size it is meant for."""
    parser = argparse.ArgumentParser(
        prog="python -m loramux.bench.merge", description=(__doc__ or "").splitlines()[0]
    )
    names = [name for name in merger_names() if not load_merger(name).searches]
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(names)}")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    chosen = given.methods or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no merging method to time is called {unknown[0]!r}; there are {names}")
    rows = measure_all(chosen, given.width, given.rank, given.threads, given.rounds)
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write("".join(f"{_line(row)}\n" for row in rows))
    full_size = given.width == 4096 and given.rank == 64
    missed = [r for r in rows if r["target"] is not None and r["seconds"] >= r["target"]]
    return 1 if full_size and missed else 0


def _line(row: dict[str, Any]) -> str:
    error, away = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("error", "distance"))
    target = "" if row["target"] is None else f"  (target {row['target']:g} s)"
    return (
        f"{row['method']:<16} {row['threads']} thread{'s' if row['threads'] > 1 else ' '}  {row['seconds']:6.3f} s "
        f"[{row['least']:.3f}, {row['most']:.3f}]  cpu {row['cpu_seconds']:6.3f} s  rank {row['rank']:>3}  "
        f"error {error}  distance to the weighted sum {away}{target}"
    )


if __name__ == "__main__":
    sys.exit(main())
