"""Numbers that say how a router behaves: how undecided it is, who gets the work, who gets none, who works together.

For one router, over the N requests or tokens it decided on:

    chosen_C     share of the N that use column C (a weight that is not 0)
    share_C      chosen_C / sum chosen_C; of a router that always uses everything, |weight|_C / sum |weight|
    violation    C * max share - 1: 0 balanced, C - 1 when one column gets everything (MaxVio of loss-free balancing)
    dead         columns whose share is 0
    pairs        share of the N that use columns i and j together, i < j

Letters: N requests or tokens, C columns (modules or experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.core.types import RouteRecord

# A curve per router and column: beyond so many only the summaries are written.
MAX_CURVES = 2048
TINY = 1e-12


@dataclass(frozen=True)
class RouterStat:
    """One router's decisions of one forward pass in numbers; `entropy` is 0 decided to 1 undecided.

    `pairs` [C, C] holds the shares of joint use; None for a router that always uses everything.
    """

    adapter: str
    path: str
    layer: int
    when: str
    columns: tuple[str, ...]
    count: int
    entropy: float
    share: tuple[float, ...]
    pairs: Tensor | None

    @property
    def dead(self) -> int:
        return sum(value == 0.0 for value in self.share)

    @property
    def violation(self) -> float:
        return len(self.share) * max(self.share) - 1.0

    @property
    def together(self) -> float | None:
        """How many times as often as the mean pair the commonest one is used; 1 if alike, None without pairs."""
        if self.pairs is None or len(self.columns) < 2:
            return None
        upper = self.pairs.triu(1)
        mean = float(upper.sum()) / (len(self.columns) * (len(self.columns) - 1) / 2)
        return float(upper.max()) / mean if mean > 0 else None

    @property
    def place(self) -> str:
        """The router's path inside its layer; empty for the layer itself."""
        _, found, tail = self.path.rpartition(f".{self.layer}.")
        return tail if found else ""


def router_stats(records: Iterable[RouteRecord]) -> list[RouterStat]:
    """One entry per router that decided anything."""
    found = (_stat(record) for record in records)
    return [stat for stat in found if stat is not None]


@torch.no_grad()
def _stat(record: RouteRecord) -> RouterStat | None:
    gates_NC, probs_NC = _kept(record)
    if gates_NC.shape[0] == 0:
        return None
    chosen_NC = (gates_NC != 0).float()
    dense = bool((chosen_NC == 1).all())
    work_C = (gates_NC.abs() if dense else chosen_NC).sum(0)
    share_C = work_C / work_C.sum().clamp_min(TINY)
    return RouterStat(
        adapter=record.adapter,
        path=record.path,
        layer=record.layer,
        when=record.when,
        columns=record.columns,
        count=gates_NC.shape[0],
        entropy=_entropy(probs_NC),
        share=tuple(share_C.tolist()),
        pairs=None if dense else (chosen_NC.T @ chosen_NC / gates_NC.shape[0]).cpu(),
    )


def _kept(record: RouteRecord) -> tuple[Tensor, Tensor]:
    gates_NC = record.gates.detach().float()
    probs_NC = gates_NC if record.probs is None else record.probs.detach().float()
    if record.valid is None:
        return gates_NC, probs_NC
    return gates_NC[record.valid], probs_NC[record.valid]


def _entropy(probs_NC: Tensor) -> float:
    # Weights with a bias outside the softmax may be negative: their size counts.
    size_NC = probs_NC.abs()
    share_NC = size_NC / size_NC.sum(-1, keepdim=True).clamp_min(torch.finfo(size_NC.dtype).tiny)
    entropy_N = torch.special.entr(share_NC).sum(-1) / math.log(max(size_NC.shape[1], 2))
    return float(entropy_N.mean())


def router_metrics(records: Iterable[RouteRecord], *, shares: bool = True) -> dict[str, float]:
    """The numbers above as curves, under `router/ADAPTER/`.

    `entropy` and `max_violation` are means over the routers, `dead` is the sum, `coactivation` the mean of
    `RouterStat.together`. With `shares` they also come per layer (`entropy/LAYER`, ...), and the share of every column
    as `LAYER/COLUMN`, or `LAYER/PLACE/COLUMN` where a layer has several routers.
    """
    by_adapter: dict[str, list[RouterStat]] = {}
    for stat in router_stats(records):
        by_adapter.setdefault(stat.adapter, []).append(stat)
    found: dict[str, float] = {}
    for name, stats in by_adapter.items():
        found |= _summary(f"router/{name}", "", stats)
        if shares:
            found |= _by_layer(f"router/{name}", stats)
    return found


def _summary(where: str, layer: str, stats: Sequence[RouterStat]) -> dict[str, float]:
    values = {
        f"{where}/entropy{layer}": _mean([stat.entropy for stat in stats]),
        f"{where}/max_violation{layer}": _mean([stat.violation for stat in stats]),
        f"{where}/dead{layer}": float(sum(stat.dead for stat in stats)),
    }
    together = [stat.together for stat in stats if stat.together is not None]
    return {**values, f"{where}/coactivation{layer}": _mean(together)} if together else values


def _by_layer(where: str, stats: Sequence[RouterStat]) -> Mapping[str, float]:
    layers: dict[int, list[RouterStat]] = {}
    for stat in stats:
        layers.setdefault(stat.layer, []).append(stat)
    found: dict[str, float] = {}
    for layer, own in layers.items():
        found |= _summary(where, f"/{layer:02d}", own)
    if sum(len(stat.columns) for stat in stats) > MAX_CURVES:
        return found
    for stat in stats:
        inside = f"/{stat.place}" if len(layers[stat.layer]) > 1 and stat.place else ""
        for column, share in zip(stat.columns, stat.share, strict=True):
            found[f"{where}/{stat.layer:02d}{inside}/{column}"] = share
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
