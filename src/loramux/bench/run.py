"""`bench("decode")` and the like: measure, and return what the command prints and writes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from loramux.bench.progress import Begin, bars
from loramux.bench.shape import FULL, QUICK, Effort, one_thread
from loramux.bench.table import Measured
from loramux.errors import LoramuxError, suggest

THREADS = 1
PARTS: Mapping[str, Mapping[str, str]] = {
    "decode": {
        "models": "loramux.bench.parts:decode_models",
        "engine": "loramux.bench.parts:decode_engine",
    },
    "prefill": {"engine": "loramux.bench.parts:prefill"},
    "mixed": {"engine": "loramux.bench.parts:mixed"},
    "load": {"models": "loramux.bench.parts:load_models", "engine": "loramux.bench.parts:swap"},
    "residency": {"engine": "loramux.bench.parts:residency"},
    "serve": {"engine": "loramux.bench.parts:serve"},
    "train": {"models": "loramux.bench.parts:train", "jobs": "loramux.bench.joint:measure"},
    "methods": {"models": "loramux.bench.train_methods:measure"},
    "score": {"models": "loramux.bench.score:score"},
}
Part = Callable[[Effort, str | None, Begin], Measured]


def bench(
    what: str,
    quick: bool = False,
    *,
    base: str | os.PathLike[str] | None = None,
    part: str | None = None,
    effort: Effort | None = None,
    rounds: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Rows of ratios, the machine they hold for, and what could not be measured here.

    `base`: a checkpoint instead of random weights of the SmolLM2 shape. `part`: only the attached models, or only the
    engine, where there are both. `quick`: few rounds on a cut model, which says that it runs and nothing about speed.
    `rounds`: at most so many paired rounds of everything; fewer give wider intervals.
    """
    chosen = _parts(what, part)
    effort = effort or (QUICK if quick else FULL)
    if rounds is not None:
        effort = effort.at_most(rounds)
    folder = None if base is None else os.fspath(base)
    measured = Measured()
    with one_thread(), bars(show_progress) as begin:
        for each in chosen:
            measured.add(each(effort, folder, begin))
        return _result(what, effort, folder, measured)


def _parts(what: str, part: str | None) -> list[Part]:
    if what not in PARTS:
        raise LoramuxError(f"nothing to measure is called {what!r}; {suggest(what, PARTS)}")
    parts = PARTS[what]
    if part is not None and part not in parts:
        raise LoramuxError(f"{what} has no part {part!r}; {suggest(part, parts)}")
    return [_found(where) for name, where in parts.items() if part in (None, name)]


def _found(where: str) -> Part:
    module, name = where.split(":")
    found: Part = getattr(importlib.import_module(module), name)
    return found


def _result(what: str, effort: Effort, folder: str | None, measured: Measured) -> dict[str, Any]:
    from loramux.bench.machine import describe_machine

    return {
        "bench": what,
        "quick": effort.is_quick,
        "base": folder or f"random weights, {effort.shape.name}",
        "rounds": measured.rows[0].extra["rounds"],
        "rows": [_as_said(row.to_dict(), effort.is_quick) for row in measured.rows],
        "absent": measured.absent,
        "details": measured.details,
        "machine": describe_machine(measured.choices, THREADS),
    }


def _as_said(row: dict[str, Any], is_quick: bool) -> dict[str, Any]:
    """A quick run settles nothing, and its rows say so."""
    return {**row, "verdict": "quick", "resolved": False} if is_quick else row
