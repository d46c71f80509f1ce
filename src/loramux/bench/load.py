"""What a user waits for: an adapter's folder becomes an attached model, or an adapter of a running engine.

Warm file cache; CPU and wall time. Two things are timed in the engine's store: a cold adapter, from its folder through
memory into a slot, and one that is in memory already but lost its slot to another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loramux
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort, copy_of, twin_of
from loramux.bench.stats import median_interval, paired_ratio, verdict
from loramux.bench.streams import build_engine
from loramux.bench.table import TARGETS, Measured, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS = "loramux.load of an r=8 adapter"
FIRST = "PeftModel.from_pretrained"
FURTHER = "PEFT load_adapter of a second one"
COLD = "engine, cold r=8 adapter from disk into a slot"
SLOT = "engine, r=8 adapter from memory into a slot"
SWITCH = "PEFT set_adapter between two loaded ones"
HOTSWAP = "PEFT hotswap_adapter from disk"
ATTACHING = ((OURS, FIRST, "load ms"), (OURS, FURTHER, "load ms"))
SWAPPING = (
    (COLD, FURTHER, "cold load ms"),
    (COLD, HOTSWAP, "cold load ms"),
    (SLOT, SWITCH, "slot ms"),
)


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


class Turns:
    """Gives the members of a cycle, one after the other."""

    def __init__(self, *members: str):
        self.members, self.at = members, 0

    def __call__(self) -> str:
        self.at += 1
        return self.members[self.at % len(self.members)]


def load_rows(model: PreTrainedModel, folder: Path, effort: Effort, begin: Begin) -> Measured:
    """A folder onto a bare model, against PEFT."""
    from peft import PeftModel

    for_ours, for_first = copy_of(model), copy_of(model)
    second = PeftModel.from_pretrained(copy_of(model), folder)
    loads = {
        OURS: Load(lambda: loramux.load(for_ours, folder), lambda handle: handle.detach()),
        FIRST: Load(
            lambda: PeftModel.from_pretrained(for_first, folder), lambda made: made.unload()
        ),
        FURTHER: _further(second, folder),
    }
    return Measured(_interleaved("load", loads, effort.load_rounds, ATTACHING, begin))


def swap_rows(
    model: PreTrainedModel, folders: Sequence[Path], effort: Effort, begin: Begin
) -> Measured:
    """Adapters of a running engine, against what PEFT does in a model that has one already. Needs two adapters."""
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    first, second = folders[:2]
    loaded = PeftModel.from_pretrained(twin_of(model), first, adapter_name="first")
    swapped = PeftModel.from_pretrained(twin_of(model), first, adapter_name="first")
    both = PeftModel.from_pretrained(twin_of(model), first, adapter_name="first")
    both.load_adapter(second, "second")
    names, paths = Turns("first", "second"), Turns(str(first), str(second))
    engine = build_engine(model, {}, batch=1, context=64, max_slots=1)
    try:
        ways = {
            COLD: cold_load(engine.store, first),
            SLOT: slot_load(engine.store, first, second),
            FURTHER: _further(loaded, second),
            SWITCH: Load(lambda: both.set_adapter(names()), lambda _: None),
            HOTSWAP: Load(lambda: hotswap_adapter(swapped, paths(), "first"), lambda _: None),
        }
        return Measured(_interleaved("swap", ways, effort.slot_rounds, SWAPPING, begin))
    finally:
        engine.close()


def cold_load(store: Any, folder: Path) -> Load:
    """From the folder to a pinned slot; afterwards the store has never heard of it."""
    mix = (("cold", 1.0),)

    def load() -> Any:
        store.register("cold", folder)
        return take(store, mix)

    def undo(lease: Any) -> None:
        store.release(lease)
        store.remove("cold")

    return Load(load, undo)


def slot_load(store: Any, first: Path, second: Path) -> Load:
    """Two adapters in memory and one slot: each turn takes the one that is not in it."""
    for name, folder in (("warm-0", first), ("warm-1", second)):
        store.register(name, folder)
        store.release(take(store, ((name, 1.0),)))
    turns = Turns("warm-0", "warm-1")
    return Load(lambda: take(store, ((turns(), 1.0),)), store.release)


def take(store: Any, mix: Any) -> Any:
    """A lease, waited for; RuntimeError if it cannot be had."""
    ticket = store.want(mix)
    while ticket.state == "loading":
        store.wait(0.05)
    lease = store.lease(ticket)
    if lease is None:
        raise RuntimeError(f"no slot is free for {mix}")
    return lease


def _further(model: Any, folder: Path) -> Load:
    return Load(
        lambda: model.load_adapter(folder, "further"), lambda _: model.delete_adapter("further")
    )


def _interleaved(
    title: str,
    loads: Mapping[str, Load],
    rounds: int,
    wanted: Sequence[tuple[str, str, str]],
    begin: Begin,
) -> list[Row]:
    measures: dict[str, Measure] = dict(loads)
    advance = begin(title, (rounds + 1) * len(loads))
    seconds = interleave(measures, rounds, done=advance)
    wall = {name: load.wall[-rounds:] for name, load in loads.items()}
    return [_row(seconds, wall, *each) for each in wanted]


def _row(
    seconds: Mapping[str, list[float]],
    wall: Mapping[str, list[float]],
    variant: str,
    reference: str,
    target: str,
) -> Row:
    """The target is for the milliseconds, not for the ratio."""
    ms, wall_ms = (median_interval([1e3 * t for t in of[variant]]) for of in (seconds, wall))
    extra = {
        "ms": round(ms.value, 3),
        "ms_low": round(ms.low, 3),
        "ms_high": round(ms.high, 3),
        "wall_ms": round(wall_ms.value, 3),
        "target_ms": TARGETS[target],
        "reference_ms": round(1e3 * median_interval(seconds[reference]).value, 2),
        "rounds": len(seconds[variant]),
    }
    found = paired_ratio(seconds[variant], seconds[reference])
    said = verdict(ms, TARGETS[target])
    return Row("load", variant, reference, 1, 1, found, None, said, True, extra)
