"""`bench("decode")` and `bench("train")`: measure, and return what the command prints and writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from loramux.bench.progress import Begin, bars
from loramux.bench.shape import FULL, QUICK, Effort, build_base, one_thread
from loramux.bench.table import Row
from loramux.errors import LoramuxError

THREADS = 1
WHATS = ("decode", "train")


def bench(
    what: str,
    quick: bool = False,
    *,
    base: str | os.PathLike[str] | None = None,
    effort: Effort | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Rows of ratios, the machine they hold for, and what could not be measured here.

    `base`: a checkpoint instead of random weights of the SmolLM2 shape. `quick`: few rounds on a cut model, which says
    that it runs and nothing about speed.
    """
    if what not in WHATS:
        raise LoramuxError(f"nothing to measure is called {what!r}; choose one of {WHATS}")
    effort = effort or (QUICK if quick else FULL)
    folder = None if base is None else os.fspath(base)
    with one_thread(), bars(show_progress) as begin:
        rows, absent, choices = (_decode if what == "decode" else _train)(effort, folder, begin)
        return _result(what, effort, folder, rows, absent, choices)


def _result(
    what: str,
    effort: Effort,
    folder: str | None,
    rows: list[Row],
    absent: dict[str, str],
    choices: dict[str, str],
) -> dict[str, Any]:
    from loramux.bench.machine import describe_machine

    return {
        "bench": what,
        "quick": effort.is_quick,
        "base": folder or f"random weights, {effort.shape.name}",
        "rounds": effort.decode_rounds if what == "decode" else effort.train_rounds,
        "rows": [_as_said(row.to_dict(), effort.is_quick) for row in rows],
        "absent": absent,
        "machine": describe_machine(choices, THREADS),
    }


def _as_said(row: dict[str, Any], is_quick: bool) -> dict[str, Any]:
    """A quick run settles nothing, and its rows say so."""
    return {**row, "verdict": "quick", "resolved": False} if is_quick else row


Measured = tuple[list[Row], dict[str, str], dict[str, str]]


def _decode(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux import handle_of
    from loramux.bench.adapters import save_adapters
    from loramux.bench.decode import close_rows, decode_rows
    from loramux.bench.load import load_rows
    from loramux.bench.subjects import TITLES, close_lineup, line_up

    base = build_base(effort.shape, folder)
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
        folders = save_adapters(base, Path(scratch))
        lineup = line_up(base, folders, begin("build the models", len(TITLES)))
        rows = decode_rows(lineup.models, effort, base.config.vocab_size, begin)
        handles = [h for h in map(handle_of, lineup.models.values()) if h is not None]
        choices = {k: v for handle in handles for k, v in handle.dispatch.choices.items()}
        lineup.models.clear()
        rows += close_rows(close_lineup(base, folders), effort, base.config.vocab_size, begin)
        rows += load_rows(base, folders.lora, effort, begin)
    return rows, lineup.absent, choices


def _train(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.memory import memory_rows
    from loramux.bench.train import train_rows

    memory = memory_rows(effort, folder, begin)
    rows, choices = train_rows(effort, folder, begin)
    return rows + memory, {}, choices
