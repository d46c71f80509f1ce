"""Decode steps of an engine whose requests belong to different tenants, against its own base, transformers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loramux.bench import engine_subjects as e
from loramux.bench import peers
from loramux.bench.adapters import Tenants
from loramux.bench.progress import Begin
from loramux.bench.shape import Effort
from loramux.bench.streams import how_decode_runs
from loramux.bench.table import Compared, Measured, at_batch, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = (
    Compared("decode", e.TENANTS, e.BASE, "tenants/own base", e.BASE_COPY),
    Compared("decode", e.TENANTS, e.BARE, "tenants/bare", e.BARE_COPY),
    Compared("decode", e.TENANTS, e.PEFT, "tenants/peft"),
    Compared("decode", e.SHARED, e.BASE, None, e.BASE_COPY),
    Compared("decode", e.BASE, e.BARE, None, e.BARE_COPY, adapters=0),
    Compared("decode", e.MILORA, e.TENANTS, "routed prompts/tenants", e.TENANTS_COPY),
    Compared("decode", e.GATED, e.BARE, "gated/bare", e.BARE_COPY),
    Compared("decode", e.GATED, e.XLORA),
    Compared("decode", e.MIXLORA, e.BARE, None, e.BARE_COPY),
    Compared("decode", e.MIXLORA, e.PACKAGE),
    Compared("decode", e.PEFT, e.BARE, None, e.BARE_COPY),
    Compared("decode", e.XLORA, e.BARE, None, e.BARE_COPY),
    Compared("decode", e.ARROW, e.BARE, None, e.BARE_COPY),
    Compared("decode", e.PACKAGE, e.BARE, None, e.BARE_COPY),
    Compared("control", e.BARE_COPY, e.BARE, None, e.BARE_COPY, adapters=0),
    Compared("control", e.BASE_COPY, e.BASE, None, e.BASE_COPY, adapters=0),
    Compared("control", e.TENANTS_COPY, e.TENANTS, None, e.TENANTS_COPY),
)
ONE_ADAPTER = (e.SHARED, e.XLORA, e.ARROW, e.PACKAGE)
ALONE = (
    *(e.BARE, e.BARE_COPY, e.BASE, e.BASE_COPY),
    *(e.TENANTS, e.MIXLORA, e.GATED, e.XLORA, e.ARROW, e.PACKAGE),
)
SEVERAL = (
    *(e.BARE, e.BARE_COPY, e.BASE, e.BASE_COPY),
    *(e.TENANTS, e.TENANTS_COPY, e.SHARED, e.MILORA, e.PEFT),
)
MANY = tuple(name for name in SEVERAL if name not in (e.MILORA, e.TENANTS_COPY))
SUBJECTS: Mapping[int, tuple[str, ...]] = {1: ALONE, 8: SEVERAL, 32: MANY}


def engine_rows(model: PreTrainedModel, tenants: Tenants, effort: Effort, begin: Begin) -> Measured:
    """Rows for every batch size of the effort; batch 1 is where single mixtures are compared with their peers."""
    measured = Measured(
        absent=peers.not_here(), choices={"decode steps of the engine": how_decode_runs(model)}
    )
    for batch, context in effort.engine_shapes:
        setting = e.Setting(model, tenants, batch, context, effort.steps)
        names = SUBJECTS.get(batch, SEVERAL)
        seconds, absent = e.timed(f"decode, batch {batch}", setting, names, effort, begin)
        rows = compare(seconds, e.TITLES, _rows(batch), batch=batch, per_call=effort.steps)
        measured.add(Measured(rows, absent))
    return measured


def _rows(batch: int) -> list[Compared]:
    """The rows of a batch size, with how many different adapters are in it."""
    found = []
    for row in at_batch(ROWS, batch):
        if row.adapters and row.variant not in ONE_ADAPTER:
            row = replace(row, adapters=batch)
        found.append(row)
    return found
