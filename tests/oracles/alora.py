"""ALoRA in the open: gated LoRA, the naive double loop over ranks, and one round of pruning and growing.

Letters: B samples, T tokens, V vocabulary, R ranks of a module. Layout: `{module path: LowRank}`
as in `oracles.lora`; gates are `{module path: tensor [R] of zeros and ones}`.

z  = x W + s x A diag(gate) B                        Eq. 3
S  = - mean cross-entropy over the response tokens
IS = S(M) - S(M without r) + S(M with r alone)       Eq. 6
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, oracle_logits

Key = tuple[str, int]  # module, rank


class Batch(NamedTuple):
    ids: Tensor
    mask: Tensor
    labels: Tensor  # -100 where nothing is supervised


def with_gates(params: Mapping[str, LowRank], gates: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The gate matrix multiplied into B's columns."""
    return {p: e._replace(B=e.B * gates[p].to(e.B.dtype)) for p, e in params.items()}


def all_gates(params: Mapping[str, LowRank], value: float) -> dict[str, Tensor]:
    return {path: torch.full((expert.A.shape[0],), value) for path, expert in params.items()}


def only(params: Mapping[str, LowRank], key: Key) -> dict[str, Tensor]:
    gates = all_gates(params, 0.0)
    gates[key[0]][key[1]] = 1.0
    return gates


def without(params: Mapping[str, LowRank], key: Key) -> dict[str, Tensor]:
    gates = all_gates(params, 1.0)
    gates[key[0]][key[1]] = 0.0
    return gates


@torch.no_grad()
def score(
    model: nn.Module, batch: Batch, params: Mapping[str, LowRank], gates: Mapping[str, Tensor]
) -> float:
    """S of the gated model."""
    logits = oracle_logits(model, batch.ids, batch.mask, with_gates(params, gates))
    total, count = 0.0, 0
    for b in range(batch.ids.shape[0]):
        for t in range(1, batch.ids.shape[1]):
            label = int(batch.labels[b, t])
            if label != -100:
                total += float(logits[b, t - 1].float().log_softmax(-1)[label].double())
                count += 1
    return total / count


def keys_of(params: Mapping[str, LowRank]) -> list[Key]:
    return [(path, rank) for path, expert in params.items() for rank in range(expert.A.shape[0])]


def importance(
    model: nn.Module, batch: Batch, params: Mapping[str, LowRank]
) -> dict[Key, tuple[float, float]]:
    """(S(M) - S(M without r), S(M with r alone)) of every rank: two forward passes each."""
    full = score(model, batch, params, all_gates(params, 1.0))
    return {
        key: (
            full - score(model, batch, params, without(params, key)),
            score(model, batch, params, only(params, key)),
        )
        for key in keys_of(params)
    }


class Round(NamedTuple):
    pruned: list[Key]
    added: dict[str, int]


def one_round(scores: Mapping[Key, float], n_A: int) -> Round:
    """Steps 5 to 7 of the procedure, without grace and without a least rank."""
    pruned = sorted(scores, key=lambda key: scores[key])[:n_A]
    modules = list(dict.fromkeys(path for path, _ in scores))
    unhurt = [m for m in modules if m not in {path for path, _ in pruned}]
    average = {m: _mean([scores[key] for key in scores if key[0] == m]) for m in unhurt}
    by_average = sorted(unhurt, key=lambda m: -average[m])
    added = dict.fromkeys(by_average, 0)
    for turn in range(len(pruned) if by_average else 0):
        added[by_average[turn % len(by_average)]] += 1
    return Round(pruned, {m: n for m, n in added.items() if n})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
