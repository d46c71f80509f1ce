"""Peak memory of jobs trained together, against one PEFT job with all their rows and against a process for every job.

Every variant runs in a process of its own, because an allocator keeps what another one freed. `above`: peak resident
memory over that of the loaded base, so adapters, gradients and moments count. `whole`: the peak itself, which is what a
process costs; the base and the libraries are in it once per process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loramux.bench.joint import Load, Peft, Rounds
from loramux.bench.memory import run_apart
from loramux.bench.progress import Begin
from loramux.bench.shape import Effort, Shape, build_base, one_thread
from loramux.bench.stats import median_interval, verdict
from loramux.bench.table import TARGETS, Row

JOINT, ALL_ROWS, ONE = "joint", "peft with all rows", "peft with one job"
KINDS = (JOINT, ALL_ROWS, ONE)
STEPS = 3
STATUS = Path("/proc/self/status")
Peak = Callable[[str, Load, Effort, "str | None"], dict[str, float]]


def memory_rows(
    load: Load, effort: Effort, folder: str | None, begin: Begin, peak: Peak | None = None
) -> list[Row]:
    """`peak` replaces the measurement itself: MB above the loaded base, and whole."""
    if not STATUS.exists() or not effort.memory_runs:
        return []  # only Linux says how much memory a process has held at most
    advance = begin("peak memory of jobs", len(KINDS) * effort.memory_runs)
    peaks: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(effort.memory_runs):
        for kind in KINDS:
            peaks[kind].append((peak or peak_in_a_process)(kind, load, effort, folder))
            advance()

    def column(kind: str, what: str, times: int = 1) -> list[float]:
        return [times * found[what] for found in peaks[kind]]

    jobs = load.jobs
    above = column(JOINT, "above")
    together = f"{load.title}, together in loramux"
    processes = f"{jobs} processes of one job each in PEFT"
    return [
        _row(f"{together}, above the base", above, "one PEFT job with all rows, above the base",
             column(ALL_ROWS, "above"), "joint memory/one job", load),
        _row(f"{together}, whole process", column(JOINT, "whole"), processes,
             column(ONE, "whole", jobs), "joint memory/processes", load),
        _row(f"{together}, above the base", above, f"{processes}, above their bases",
             column(ONE, "above", jobs), None, load),
    ]  # fmt: skip


def _row(
    variant: str,
    own: list[float],
    reference: str,
    other: list[float],
    wanted: str | None,
    load: Load,
) -> Row:
    found = median_interval([a / b for a, b in zip(own, other, strict=True)])
    target = None if wanted is None else TARGETS[wanted]
    extra = {
        "mb": round(median_interval(own).value, 1),
        "reference_mb": round(median_interval(other).value, 1),
        "rounds": len(own),
    }
    return Row(
        "memory of jobs", variant, reference, load.jobs * load.rows, load.jobs, found, target,
        verdict(found, target), True, extra,
    )  # fmt: skip


def peak_in_a_process(
    kind: str, load: Load, effort: Effort, folder: str | None
) -> dict[str, float]:
    """MB at the peak of a few steps, above the loaded base and whole."""
    work = {"kind": kind, "load": asdict(load), "shape": asdict(effort.shape), "folder": folder}
    return run_apart("loramux.bench.joint_memory", work)


def measure(kind: str, load: Load, shape: Shape, folder: str | None) -> dict[str, float]:
    """MB that this process holds at the peak of a few steps."""
    import peft  # noqa: F401  # before the first reading: code is not what is measured

    import loramux.train.joint  # noqa: F401

    with one_thread():
        base = build_base(shape, folder)
        before = _kib("VmRSS")
        subject = (
            Rounds(base, load, joint=True)
            if kind == JOINT
            else Peft(
                base, replace(load, jobs=1) if kind == ONE else load, at_once=kind == ALL_ROWS
            )
        )
        for _ in range(STEPS):
            subject.step()
    peak = _kib("VmHWM")
    return {"above": (peak - before) * 1024 / 1e6, "whole": peak * 1024 / 1e6}


def _kib(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _main(work: dict[str, Any]) -> None:
    found = measure(work["kind"], Load(**work["load"]), Shape(**work["shape"]), work["folder"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
