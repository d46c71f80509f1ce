"""Prompts: from the arrival of several requests to the first token of all of them, each with an adapter of its own.

The prompts are other ones in every round, so that no prefix cache can answer. The bare model computes the logits of the
last position only, as `generate` does, and fills a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from loramux.bench import engine_subjects as e
from loramux.bench import peers
from loramux.bench.adapters import Tenants, by_name
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort, twin_of
from loramux.bench.streams import Batch, Prompting
from loramux.bench.table import Compared, Measured, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = (
    Compared("prefill", e.TENANTS, e.BARE, "prefill/bare", e.BARE_COPY),
    Compared("prefill", e.TENANTS, e.BASE, None, e.BASE_COPY),
    Compared("prefill", e.BASE, e.BARE, None, e.BARE_COPY, adapters=0),
    Compared("prefill", e.TENANTS, e.PEFT),
    Compared("prefill", e.PEFT, e.BARE, None, e.BARE_COPY),
    Compared("control", e.BARE_COPY, e.BARE, None, e.BARE_COPY, adapters=0),
    Compared("control", e.BASE_COPY, e.BASE, None, e.BASE_COPY, adapters=0),
)


class Prefill:
    """A transformers model on the same prompts as an engine gets; a call gives the seconds of one forward."""

    def __init__(self, model: Any, batch: Batch):
        self.model, self.batch, self.calls = model, batch, 0

    def __call__(self) -> float:
        prompt_BT = torch.tensor(self.batch.prompts(self.calls))
        self.calls += 1
        with torch.no_grad():
            return cpu_seconds(lambda: self._timed(prompt_BT))

    def _timed(self, prompt_BT: torch.Tensor) -> None:
        out = self.model(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            use_cache=True,
            logits_to_keep=1,
        )
        out.logits[:, -1].argmax(-1).tolist()


def prefill_rows(
    model: PreTrainedModel, tenants: Tenants, effort: Effort, begin: Begin
) -> Measured:
    batch, length = effort.prefill_shape
    setting = e.Setting(model, tenants, batch, length, effort.steps)
    subjects, absent = peers.line_up(_makers(setting))
    # PEFT froze the shared weights, and torch copies a frozen head for every row that it gets a slice of.
    # An unmodified model is not frozen; measured like that, PEFT gains as well (docs/performance.md).
    model.requires_grad_(True)
    try:
        e.check_engines(setting, subjects)
        measures: dict[str, Measure] = dict(subjects)
        advance = begin(f"prefill, {batch} x {length}", (effort.prefill_rounds + 1) * len(subjects))
        seconds = interleave(measures, effort.prefill_rounds, done=advance)
    finally:
        e.close_engines(subjects)
    rows = [_of(row, batch) for row in ROWS]
    named = {e.TITLES[name]: why for name, why in absent.items()}
    return Measured(compare(seconds, e.TITLES, rows, batch=batch, per_call=1), named)


def _of(row: Compared, batch: int) -> Compared:
    return replace(row, adapters=batch) if row.adapters else row


def _makers(setting: e.Setting) -> dict[str, Callable[[], Any]]:
    model, tenants = setting.model, setting.tenants

    def engine(name: str) -> Prompting:
        asked = e.asked_by(name, tenants, setting.batch)
        return Prompting(e.engine_for(setting, asked), setting.of(asked))

    def mixed() -> Prefill:
        asked = [str(name) for name in e.asked_by(e.TENANTS, tenants, setting.batch)]
        made = peers.peft_mixed(model, by_name(tenants.plain), asked)
        return Prefill(made, setting.of(asked))

    bare = setting.of((None,) * setting.batch)
    return {
        e.BARE: lambda: Prefill(twin_of(model), bare),
        e.BARE_COPY: lambda: Prefill(twin_of(model), bare),
        **{n: lambda n=n: engine(n) for n in (e.BASE, e.BASE_COPY, e.TENANTS)},  # type: ignore[misc]
        e.PEFT: mixed,
    }
