"""Ablation scores of single ranks: with prefix reuse and batched gates against the plain double loop.

One rank of every third linear of each layer is scored, so all depths count alike; what one rank costs in the plain loop
does not depend on which one it is. fp32, since half precision rounds away what a single rank does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import loramux
from loramux.bench.adapters import RANK
from loramux.bench.progress import Begin
from loramux.bench.rounds import cpu_seconds, interleave
from loramux.bench.shape import Effort, build_base
from loramux.bench.table import Compared, Measured, compare
from loramux.core.ablation import Unit, ablation_scores
from loramux.core.supervised import token_losses

if TYPE_CHECKING:
    from loramux.core.adapter import Adapter

NAIVE, AGAIN, PREFIX, BOTH = "naive", "again", "prefix", "both"
EVERY = 3  # linears, of which one rank is scored
ROWS = (
    Compared("score ranks", BOTH, NAIVE, "score/naive", AGAIN),
    Compared("score ranks", PREFIX, NAIVE, None, AGAIN),
    Compared("control", AGAIN, NAIVE, None, AGAIN),
)


def score(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    """Rows for every number of layers."""
    measured = Measured()
    for layers in effort.score_layers if folder is None else (0,):
        measured.add(_rows(effort, folder, layers, begin))
    return measured


def _rows(effort: Effort, folder: str | None, layers: int, begin: Begin) -> Measured:
    shape = replace(effort.shape, layers=layers) if layers else effort.shape
    model = build_base(shape, folder).float()
    handle = loramux.attach(model, loramux.LoraConfig(r=RANK, lora_alpha=RANK))
    adapter = handle.adapters["default"]
    fill(adapter)
    batch = make_batch(effort, model.config.vocab_size)
    units = [Unit(path, (i % RANK,)) for i, path in enumerate(adapter.rows)][::EVERY]
    ways: Mapping[str, Callable[[], Tensor]] = {
        NAIVE: lambda: naive(handle, batch, units),
        AGAIN: lambda: naive(handle, batch, units),
        PREFIX: lambda: (
            ablation_scores(handle, batch, units, tokens_per_forward=1, reuse=True).importance
        ),
        BOTH: lambda: ablation_scores(handle, batch, units, reuse=True).importance,
    }
    advance = begin(
        f"score {len(units)} ranks, {model.config.num_hidden_layers} layers",
        len(ways) * (1 + effort.score_rounds),
    )
    found: dict[str, Tensor] = {}

    def timed(name: str) -> Callable[[], float]:
        return lambda: cpu_seconds(lambda: found.update({name: ways[name]()}))

    seconds = interleave({name: timed(name) for name in ways}, effort.score_rounds, done=advance)
    depth = f"{model.config.num_hidden_layers} layers"
    titles = {
        NAIVE: f"plain double loop, {depth}",
        AGAIN: f"the plain loop again, {depth}",
        PREFIX: f"prefix reuse, {depth}",
        BOTH: f"prefix reuse and batched gates, {depth}",
    }
    rows = compare(seconds, titles, ROWS, batch=effort.train_batch, per_call=len(units))
    apart = {name: float((found[name] - found[NAIVE]).abs().max()) for name in (PREFIX, BOTH)}
    details: dict[str, Any] = {"score": {depth: {"ranks": len(units), "largest_difference": apart}}}
    return Measured(rows, {}, dict(handle.dispatch.choices), details)


def naive(handle: Any, batch: Mapping[str, Tensor], units: list[Unit]) -> Tensor:
    """Two whole forward passes per rank, one rank at a time."""
    adapter = handle.adapters["default"]
    call = {key: batch[key] for key in ("input_ids", "attention_mask")}
    num = call["input_ids"].shape[0]

    def run(masks: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), handle.masking(masks):
            return -token_losses(handle.model, call, batch["labels"]).double().mean()

    full = run({})
    found = []
    for unit in units:
        off = {unit.path: torch.ones(num, RANK)}
        on = {path: torch.zeros(num, RANK) for path in adapter.rows}
        off[unit.path][:, unit.rows[0]], on[unit.path][:, unit.rows[0]] = 0.0, 1.0
        found.append(full - run(off) + run(on))
    return torch.stack(found)


@torch.no_grad()
def fill(adapter: Adapter) -> None:
    """B off zero, as after some training: a rank that does nothing is not run at all."""
    draw = torch.Generator().manual_seed(0)
    for rows in adapter.rows.values():
        rows.b.copy_(0.02 * torch.randn(rows.b.shape, generator=draw))


def make_batch(effort: Effort, vocab: int) -> dict[str, Tensor]:
    """Random tokens; the last eighth of each row is supervised, as a short answer is."""
    draw = torch.Generator().manual_seed(0)
    length = max(8, effort.train_length // 4)
    ids = torch.randint(vocab, (effort.train_batch, length), generator=draw)
    labels = ids.clone()
    labels[:, : -(length // 8)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
