"""The heterogeneous batch: plain LoRAs, MiLoRAs, MixLoRAs and gated mixtures side by side, against plain LoRAs only.

Every request has an adapter of its own. None of the other implementations can run such a batch; each kind alone is
timed as well, so that the picture shows which of them costs what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramux.bench import engine_subjects as e
from loramux.bench.adapters import Tenants
from loramux.bench.progress import Begin
from loramux.bench.shape import Effort
from loramux.bench.table import Compared, Measured, at_batch, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = (
    Compared("mixed", e.MIXED, e.TENANTS, "mixed/tenants", e.TENANTS_COPY),
    Compared("mixed", e.MIXED, e.BASE),
    Compared("mixed", e.TENANTS, e.BASE),
    Compared("control", e.TENANTS_COPY, e.TENANTS, None, e.TENANTS_COPY),
)
KINDS = (
    Compared("one kind", e.MILORA, e.TENANTS, None, e.TENANTS_COPY),
    Compared("one kind", e.MIXLORA, e.TENANTS, None, e.TENANTS_COPY),
    Compared("one kind", e.GATED, e.TENANTS, None, e.TENANTS_COPY),
    Compared("control", e.TENANTS_COPY, e.TENANTS, None, e.TENANTS_COPY),
)
NO_PEER = {
    "peers of the mixed batch": "no installed implementation runs requests of different methods in one batch"
}


def mixed_rows(model: PreTrainedModel, tenants: Tenants, effort: Effort, begin: Begin) -> Measured:
    measured = Measured(absent=dict(NO_PEER))
    for wanted, batch in ((WHOLE, 4 * effort.mixed), (KINDS, effort.mixed)):
        setting = e.Setting(model, tenants, batch, effort.mixed_context, effort.steps)
        names = list(dict.fromkeys(n for row in wanted for n in (row.variant, row.reference)))
        seconds, _ = e.timed(f"mixed, batch {batch}", setting, names, effort, begin)
        rows = at_batch(wanted, batch)
        measured.rows += compare(seconds, e.TITLES, rows, batch=batch, per_call=effort.steps)
    return measured
