"""The parts of every measurement: what has to be there before its rows can be taken."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loramux.bench.adapters import Tenants, save_adapters, save_tenants
from loramux.bench.progress import Begin
from loramux.bench.shape import Effort, build_base
from loramux.bench.table import Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATED_OF = 4


def decode_models(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    """Attached models, each over its own copy of the weights."""
    from loramux import handle_of
    from loramux.bench.decode import close_rows, decode_rows
    from loramux.bench.subjects import TITLES, close_lineup, line_up

    base = build_base(effort.shape, folder)
    with _scratch() as scratch:
        folders = save_adapters(base, scratch)
        lineup = line_up(base, folders, begin("build the models", len(TITLES)))
        rows = decode_rows(lineup.models, effort, base.config.vocab_size, begin)
        handles = [h for h in map(handle_of, lineup.models.values()) if h is not None]
        choices = {k: v for handle in handles for k, v in handle.dispatch.choices.items()}
        lineup.models.clear()
        rows += close_rows(close_lineup(base, folders), effort, base.config.vocab_size, begin)
    return Measured(rows, lineup.absent, choices)


def decode_engine(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.engine_decode import engine_rows

    plain = max(GATED_OF, *(batch for batch, _ in effort.engine_shapes))
    counts = {"plain": plain, "milora": 8, "mixlora": 1, "gated": 1}
    with _tenants(effort, folder, begin, **counts) as (base, tenants):
        return engine_rows(base, tenants, effort, begin)


def prefill(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.prefill import prefill_rows

    with _tenants(effort, folder, begin, plain=effort.prefill_shape[0]) as (base, tenants):
        return prefill_rows(base, tenants, effort, begin)


def mixed(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.mixed import mixed_rows

    each = effort.mixed
    counts = {"plain": max(4 * each, GATED_OF), "milora": each, "mixlora": each, "gated": each}
    with _tenants(effort, folder, begin, **counts) as (base, tenants):
        return mixed_rows(base, tenants, effort, begin)


def load_models(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.load import load_rows

    with _tenants(effort, folder, begin, plain=1) as (base, tenants):
        return load_rows(base, tenants.plain[0], effort, begin)


def swap(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.load import swap_rows

    with _tenants(effort, folder, begin, plain=2) as (base, tenants):
        return swap_rows(base, tenants.plain, effort, begin)


def residency(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.residency import residency_rows

    with _tenants(effort, folder, begin, plain=effort.residency[-1]) as (base, tenants):
        return residency_rows(base, tenants.plain, effort, begin)


def serve(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.serve import serve_rows

    with _tenants(effort, folder, begin, plain=effort.serve_adapters) as (base, tenants):
        return serve_rows(base, tenants.plain, effort, begin)


def train(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    from loramux.bench.memory import memory_rows
    from loramux.bench.train import train_rows

    memory = memory_rows(effort, folder, begin)
    rows, choices = train_rows(effort, folder, begin)
    return Measured(rows + memory, {}, choices)


@contextmanager
def _tenants(
    effort: Effort, folder: str | None, begin: Begin, **counts: int
) -> Iterator[tuple[PreTrainedModel, Tenants]]:
    """A base and so many adapters of each kind for it, saved where they are gone afterwards."""
    base = build_base(effort.shape, folder)
    with _scratch() as scratch:
        done = begin("make adapters", sum(counts.values()))
        yield base, save_tenants(base, scratch, **counts, gated_of=GATED_OF, done=done)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        yield Path(folder)
