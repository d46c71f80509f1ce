"""Rows of the result: what was compared, the ratio with its interval, the target, and whether that settles it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from loramux.bench.stats import Interval, is_resolved, paired_ratio, verdict

# Largest ratio to be reached, by row; a load time is in milliseconds. "@ 8": holds for batch 8 only.
TARGETS: dict[str, float] = {
    "lora/bare": 1.10,
    "lora/peft": 0.80,
    "milora/lora": 1.0,
    "mixlora/bare": 1.5,
    "mixlora step/peft": 1.25,
    "mixlora memory/peft": 1.3,
    "method step/peft": 1.3,
    "8 jobs/peft": 0.40,
    "4 jobs/peft": 0.75,
    "1 job/peft": 0.80,
    "mixlora job/lora": 1.25,
    "joint memory/one job": 1.1,
    "joint memory/processes": 0.3,
    "joint overhead": 0.03,
    "score/naive": 1 / 1.5,
    "load ms": 60.0,
    "tenants/own base @ 8": 1.08,
    "tenants/own base @ 32": 1.18,
    "tenants/bare @ 1": 0.6,
    "tenants/bare @ 8": 0.75,
    "tenants/peft @ 8": 1 / 4.5,
    "tenants/peft @ 32": 1 / 9,
    "routed prompts/tenants @ 8": 1.02,
    "gated/bare @ 1": 1.6,
    "mixed/tenants @ 32": 1.5,
    "prefill/bare": 0.8,
    "cold load ms": 40.0,
    "slot ms": 1.0,
    "residency": 1.05,
    "serve/generate": 1 / 1.3,
}


@dataclass(frozen=True)
class Row:
    """One comparison. `target` is for `ratio` unless `unit` says otherwise in `extra`."""

    what: str
    variant: str
    reference: str
    batch: int
    adapters: int
    found: Interval
    target: float | None = None
    verdict: str = ""
    resolved: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "variant": self.variant,
            "reference": self.reference,
            "batch": self.batch,
            "adapters": self.adapters,
            "ratio": round(self.found.value, 5),
            "low": round(self.found.low, 5),
            "high": round(self.found.high, 5),
            "target": self.target,
            "verdict": self.verdict,
            "resolved": self.resolved,
            **self.extra,
        }


@dataclass(frozen=True)
class Compared:
    """One row to be: two subjects by key, and the key of the control whose spread it must leave."""

    what: str
    variant: str
    reference: str
    target: str | None = None
    control: str | None = None
    adapters: int = 1


@dataclass
class Measured:
    """What a measurement found. choices: backend -> why it ran; details: what pictures need beyond the rows."""

    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        self.rows += other.rows
        self.absent |= other.absent
        self.choices |= other.choices
        self.details |= other.details


def at_batch(wanted: Sequence[Compared], batch: int) -> list[Compared]:
    """The rows with the targets of this batch size: of a target that names others nothing is left."""
    found = []
    for row in wanted:
        target = row.target
        if target is not None and target not in TARGETS:
            target = f"{target} @ {batch}" if f"{target} @ {batch}" in TARGETS else None
        found.append(replace(row, target=target))
    return found


def compare(
    seconds: Mapping[str, Sequence[float]],
    titles: Mapping[str, str],
    wanted: Sequence[Compared],
    *,
    batch: int,
    per_call: int,
) -> list[Row]:
    """Rows for the subjects that were timed; rows of absent subjects are left out. `per_call`: steps in one time."""
    return [
        _row(seconds, titles, each, batch, per_call)
        for each in wanted
        if each.variant in seconds and each.reference in seconds
    ]


def _row(
    seconds: Mapping[str, Sequence[float]],
    titles: Mapping[str, str],
    each: Compared,
    batch: int,
    per_call: int,
) -> Row:
    found = paired_ratio(seconds[each.variant], seconds[each.reference])
    control = None
    if each.control is not None and each.control in seconds:
        control = paired_ratio(seconds[each.control], seconds[each.reference])
    target = None if each.target is None else TARGETS[each.target]
    resolved = is_resolved(found, control)
    said = verdict(found, target)
    if target == 1.0 and not resolved and said == "met":
        said = "open"  # a gain smaller than the control's spread is not claimed
    return Row(
        each.what,
        titles[each.variant],
        titles[each.reference],
        batch,
        each.adapters,
        found,
        target,
        "control" if each.variant == each.control else said,
        resolved,
        {
            "ms": round(1e3 * median(seconds[each.variant]) / per_call, 4),
            "reference_ms": round(1e3 * median(seconds[each.reference]) / per_call, 4),
            "rounds": len(seconds[each.variant]),
        },
    )
