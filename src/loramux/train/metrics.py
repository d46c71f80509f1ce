"""Numbers that say how a router behaves: how undecided it is, and who gets the work.

Letters: N requests or tokens, C columns (modules or experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from loramux.core.types import RouteRecord


def router_metrics(records: Iterable[RouteRecord], *, shares: bool = True) -> dict[str, float]:
    """`router/ADAPTER/entropy` (mean over layers, 0 decided to 1 undecided) and `router/ADAPTER/LAYER/COLUMN`.

    The latter is the share of the selections (of the weight, for routers that select everything) of a layer that went
    to a column: one over the number of columns is balanced, 0 is a dead expert. `shares=False` leaves them out.
    """
    entropies: dict[str, list[float]] = {}
    found: dict[str, float] = {}
    for record in records:
        gates_NC, probs_NC = _kept(record)
        if gates_NC.shape[0] == 0:
            continue
        entropies.setdefault(record.adapter, []).append(_entropy(probs_NC))
        if shares:
            found |= _shares(record, gates_NC)
    means = {f"router/{name}/entropy": sum(e) / len(e) for name, e in entropies.items()}
    return {**means, **found}


def _kept(record: RouteRecord) -> tuple[Tensor, Tensor]:
    gates_NC = record.gates.detach().float()
    probs_NC = gates_NC if record.probs is None else record.probs.detach().float()
    if record.valid is None:
        return gates_NC, probs_NC
    return gates_NC[record.valid], probs_NC[record.valid]


def _entropy(probs_NC: Tensor) -> float:
    share_NC = probs_NC / probs_NC.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_NC.dtype).tiny)
    entropy_N = torch.special.entr(share_NC).sum(-1) / math.log(max(probs_NC.shape[1], 2))
    return float(entropy_N.mean())


def _shares(record: RouteRecord, gates_NC: Tensor) -> Mapping[str, float]:
    chosen_NC = (gates_NC > 0).float()
    if bool((chosen_NC == 1).all()):
        chosen_NC = gates_NC
    share_C = chosen_NC.sum(0) / chosen_NC.sum().clamp_min(1e-12)
    where = f"router/{record.adapter}/{record.layer:02d}"
    return {
        f"{where}/{column}": share
        for column, share in zip(record.columns, share_C.tolist(), strict=True)
    }
