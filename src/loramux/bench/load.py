"""From an adapter's folder to an attached model: what a user waits for, warm file cache, CPU and wall time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loramux
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort, copy_of
from loramux.bench.stats import median_interval, paired_ratio, verdict
from loramux.bench.table import TARGETS, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS = "loramux.load of an r=8 adapter"
FIRST = "PeftModel.from_pretrained"
FURTHER = "PEFT load_adapter of a second one"


class Load:
    """Times one way to load and undoes it; keeps the wall time beside the CPU time."""

    def __init__(self, load: Callable[[], Any], undo: Callable[[Any], object]):
        self.load, self.undo = load, undo
        self.wall: list[float] = []
        self.loaded: Any = None

    def __call__(self) -> float:
        start = time.perf_counter()
        seconds = cpu_seconds(self._timed)
        self.wall.append(time.perf_counter() - start)
        self.undo(self.loaded)
        self.loaded = None
        return seconds

    def _timed(self) -> None:
        self.loaded = self.load()


def load_rows(base: PreTrainedModel, folder: Path, effort: Effort, begin: Begin) -> list[Row]:
    from peft import PeftModel

    for_ours, for_first = copy_of(base), copy_of(base)
    second = PeftModel.from_pretrained(copy_of(base), folder)
    loads = {
        OURS: Load(lambda: loramux.load(for_ours, folder), lambda handle: handle.detach()),
        FIRST: Load(
            lambda: PeftModel.from_pretrained(for_first, folder), lambda model: model.unload()
        ),
        FURTHER: Load(
            lambda: second.load_adapter(folder, "second"), lambda _: second.delete_adapter("second")
        ),
    }
    measures: dict[str, Measure] = dict(loads)
    advance = begin("load", (effort.load_rounds + 1) * len(loads))
    seconds = interleave(measures, effort.load_rounds, done=advance)
    return [_row(seconds, loads, reference) for reference in (FIRST, FURTHER)]


def _row(seconds: dict[str, list[float]], loads: dict[str, Load], reference: str) -> Row:
    ms, wall = (
        median_interval([1e3 * t for t in times])
        for times in (seconds[OURS], loads[OURS].wall[-len(seconds[OURS]) :])
    )
    target = TARGETS["load ms"]
    extra = {
        "ms": round(ms.value, 2),
        "ms_low": round(ms.low, 2),
        "ms_high": round(ms.high, 2),
        "wall_ms": round(wall.value, 2),
        "target_ms": target,
        "reference_ms": round(1e3 * median_interval(seconds[reference]).value, 2),
        "rounds": len(seconds[OURS]),
    }
    found = paired_ratio(seconds[OURS], seconds[reference])
    return Row("load", OURS, reference, 1, 1, found, None, verdict(ms, target), True, extra)
