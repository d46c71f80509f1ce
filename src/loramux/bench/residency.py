"""Decoding while 1, 10, 100 or 1,000 adapters are resident: does a step get slower by adapters that it does not use?

Resident is an adapter that holds a slot, ready for a request of the next step. Two batches are timed at each number:
all requests with one adapter, and every request with an adapter of its own as far as they go round; they are taken in
turn from all that are resident. The reference is the engine with a single resident adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.bench.adapters import TENSORS, by_name
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, interleave
from loramux.bench.shape import Effort
from loramux.bench.streams import MIB, Batch, Decoding, build_engine, drain, start
from loramux.bench.table import Compared, Measured, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8
COPY = "copy"


class Rotating(Decoding):
    """A batch that starts anew for every measurement, with the next `distinct` adapters of all that are resident.

    It leaves its engine empty, so that several batches can be measured in one engine.
    """

    def __init__(
        self, engine: Any, names: Sequence[str], distinct: int, batch: Batch, steps: int
    ) -> None:
        super().__init__(engine, batch, steps, restart_every=1)
        self.names, self.distinct, self.at = list(names), distinct, 0

    def next_batch(self) -> Batch:
        chosen = [self.names[(self.at + i) % len(self.names)] for i in range(self.distinct)]
        self.at = (self.at + self.distinct) % len(self.names)
        asked = tuple(chosen[i % len(chosen)] for i in range(len(self.batch.asked)))
        return replace(self.batch, asked=asked)

    def __call__(self) -> float:
        seconds = super().__call__()
        self.stop()
        return seconds


def residency_rows(
    model: PreTrainedModel, folders: Sequence[Path], effort: Effort, begin: Begin
) -> Measured:
    """`folders`: as many plain adapters as the largest number asks for."""
    context = effort.mixed_context
    batch = Batch((None,) * BATCH, context, int(model.config.vocab_size))
    subjects: dict[str, Measure] = {}
    engines: list[Any] = []
    loaded = begin("load adapters", sum(effort.residency))
    try:
        for count in effort.residency:
            names = [folder.name for folder in folders[:count]]
            engines.append(crowded(model, folders[:count], batch, loaded))
            for distinct in sorted({1, min(BATCH, count)}):
                key = _key(count, distinct)
                subjects[key] = Rotating(engines[-1], names, distinct, batch, effort.steps)
        subjects[COPY] = Rotating(engines[0], [folders[0].name], 1, batch, effort.steps)
        advance = begin("residency", (effort.engine_rounds + 1) * len(subjects))
        seconds = interleave(subjects, effort.engine_rounds, done=advance)
    finally:
        for engine in engines:
            engine.close()
    wanted, titles, in_batch = _wanted(effort.residency)
    rows = compare(seconds, titles, wanted, batch=BATCH, per_call=effort.steps)
    return Measured(
        [
            replace(row, extra={**row.extra, "in_batch": distinct})
            for row, distinct in zip(rows, in_batch, strict=True)
        ]
    )


def crowded(
    model: PreTrainedModel, folders: Sequence[Path], batch: Batch, done: Callable[[], None]
) -> Any:
    """An engine in which all of these adapters are resident: each has answered a request."""
    count = len(folders)
    room = f"{64 + int(1.5 * count * (folders[0] / TENSORS).stat().st_size / MIB)}MiB"
    engine = build_engine(
        model,
        by_name(folders),
        batch=len(batch.asked),
        context=2 * batch.length + 64,
        max_slots=count + 1,
        adapter_memory=room,
        slot_memory=room,
    )
    names = [folder.name for folder in folders]
    for first in range(0, count, BATCH):
        some = Batch(tuple(names[first : first + BATCH]), 2, batch.vocab)
        ids = start(engine, some, some.prompts(), 1)
        drain(engine)
        for request in ids:
            engine.completion(request)
            done()
    held = engine.store.stats().num_slots_used
    if held < count:
        raise RuntimeError(f"{held} of {count} adapters are resident; not timing that")
    return engine


def _key(count: int, distinct: int) -> str:
    return f"{count} resident, {distinct} in the batch"


def _wanted(counts: Sequence[int]) -> tuple[list[Compared], dict[str, str], list[int]]:
    """Rows, titles, and how many different adapters each row has in its batch. The target is for the largest number."""
    reference = _key(counts[0], 1)
    rows, in_batch = [], []
    titles = {reference: _title(counts[0], 1), COPY: f"{_title(counts[0], 1)}, again"}
    for count in counts[1:]:
        for distinct in sorted({1, min(BATCH, count)}):
            key = _key(count, distinct)
            titles[key] = _title(count, distinct)
            target = "residency" if count == counts[-1] else None
            rows.append(Compared("residency", key, reference, target, COPY, adapters=count))
            in_batch.append(distinct)
    rows.append(Compared("control", COPY, reference, None, COPY, adapters=counts[0]))
    return rows, titles, [*in_batch, 1]


def _title(count: int, distinct: int) -> str:
    return f"engine, {count:,} resident, {distinct} of them in the batch"
