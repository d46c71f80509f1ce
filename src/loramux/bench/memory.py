"""Peak memory of a training step above the loaded base: every variant in a process of its own.

Why processes: an allocator keeps what one variant freed, and the next one would find it. Counted from the loaded base,
so that rows, gradients and optimizer moments of the adapter are part of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramux.bench.progress import Begin
from loramux.bench.shape import Effort, Shape
from loramux.bench.stats import median_interval, verdict
from loramux.bench.table import TARGETS, Row

Peak = Callable[[str, Effort, str | None], float]
STEPS = 2
STATUS = Path("/proc/self/status")


def memory_rows(
    effort: Effort, folder: str | None, begin: Begin, peak: Peak | None = None
) -> list[Row]:
    """`peak` replaces the measurement itself."""
    from loramux.bench import train as t

    if not STATUS.exists() or not effort.memory_runs:
        return []  # only Linux says how much memory a process has held at most
    kinds = [t.PEFT, t.LORA, t.MILORA, t.MIXLORA]
    kinds += [kind + t.CHECKPOINTED for kind in (t.PEFT, t.MIXLORA)]
    advance = begin("peak memory", len(kinds) * effort.memory_runs)
    peaks: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(effort.memory_runs):
        for kind in kinds:
            peaks[kind].append((peak or peak_in_a_process)(kind, effort, folder))
            advance()
    rows = []
    for kind in kinds:
        reference = t.PEFT + (t.CHECKPOINTED if kind.endswith(t.CHECKPOINTED) else "")
        if kind != reference:
            target = TARGETS["mixlora memory/peft"] if kind == t.MIXLORA else None
            rows.append(_row(peaks, kind, reference, target, effort.train_batch))
    return rows


def _row(
    peaks: dict[str, list[float]], kind: str, reference: str, target: float | None, batch: int
) -> Row:
    from loramux.bench.train import CHECKPOINTED, TITLES

    def title(name: str) -> str:
        plain = TITLES[name.removesuffix(CHECKPOINTED)]
        return plain + (", gradient checkpointing" if name.endswith(CHECKPOINTED) else "")

    found = median_interval([a / b for a, b in zip(peaks[kind], peaks[reference], strict=True)])
    extra = {
        "mb": round(median_interval(peaks[kind]).value, 1),
        "reference_mb": round(median_interval(peaks[reference]).value, 1),
        "rounds": len(peaks[kind]),
    }
    return Row(
        "training memory", title(kind), title(reference), batch, 1, found, target,
        verdict(found, target), True, extra,
    )  # fmt: skip


def peak_in_a_process(kind: str, effort: Effort, folder: str | None) -> float:
    """MB at the peak, above the loaded base."""
    work = {"kind": kind, "effort": asdict(effort), "folder": folder}
    return float(run_apart("loramux.bench.memory", work)["mb"])


def run_apart(module: str, work: dict[str, Any]) -> dict[str, float]:
    """What `python -m module WORK` prints as its last line, run with one thread; `work` has a `kind`."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(work)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {work['kind']} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(kind: str, effort: Effort, folder: str | None) -> float:
    """MB that this process holds at the peak of a few steps, above the loaded base."""
    import peft  # noqa: F401  # before the first reading: code is not what is measured

    from loramux.bench.shape import build_base, one_thread
    from loramux.bench.train import Trainer, attach_for_training, make_batch

    with one_thread():
        base = build_base(effort.shape, folder)
        batch = make_batch(effort, base.config.vocab_size)
        before = _kib("VmRSS")
        trainer = Trainer(attach_for_training(base, kind), batch)
        for _ in range(STEPS):
            trainer.step()
    return (_kib("VmHWM") - before) * 1024 / 1e6


def _kib(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _main(work: dict[str, Any]) -> None:
    shape = Shape(**work["effort"].pop("shape"))
    effort = Effort(shape=shape, **work["effort"])
    megabytes = measure(work["kind"], effort, work["folder"])
    sys.stdout.write(json.dumps({"mb": megabytes}) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
