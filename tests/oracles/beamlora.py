"""BeamLoRA: dense scores and weights, and one event on plain Python lists.

Letters: B samples, T tokens, I input width, O output width, r ranks.

Layout of one linear: `Layer(A [r, I], B [O, r], gamma [r], scale, tau)`; of a model: `{module path: Layer}`.

y = W0 x + scale * B ( (A x) * shat ),   shat = r * softmax(gamma / tau)
p_t = 1 - (1 - p0) (1 + cos(pi t / T_end)) / 2 up to T_end, then 1

State of one linear in an event: `Ranks`, whose entries are lists with one element per rank. `rank` and `before` stand
for everything that belongs to a rank (its row of A, its column of B, their two Adam moments each) now and half an
interval ago: any object, since an event only moves them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oracles.surgery import base_weight, model_logits, replaced_forwards


class Layer(NamedTuple):
    A: Tensor
    B: Tensor
    gamma: Tensor
    scale: float
    tau: float


def scores(gamma: Sequence[float], tau: float) -> list[float]:
    power = [math.exp((value - max(gamma)) / tau) for value in gamma]
    return [len(gamma) * value / sum(power) for value in power]


def score_vector(layer: Layer) -> Tensor:
    power: Tensor = torch.exp((layer.gamma - layer.gamma.max()) / layer.tau)
    normed: Tensor = len(power) * power / power.sum()
    return normed


def merged_weight(W: Tensor, layer: Layer) -> Tensor:
    """W0 + scale B diag(shat) A."""
    dense: Tensor = W + layer.scale * layer.B @ torch.diag(score_vector(layer)) @ layer.A
    return dense


def oracle_logits(
    model: nn.Module, ids: Tensor, mask: Tensor | None, params: Mapping[str, Layer]
) -> Tensor:
    forwards = {path: _forward(model.get_submodule(path), layer) for path, layer in params.items()}
    with replaced_forwards(model, forwards):
        return model_logits(model, ids, mask)


def _forward(module: nn.Module, layer: Layer) -> Callable[[Tensor], Tensor]:
    W, bias = base_weight(module)

    def forward(x: Tensor) -> Tensor:
        y = x @ W.T + layer.scale * ((x @ layer.A.T) * score_vector(layer)) @ layer.B.T
        return y if bias is None else y + bias

    return forward


def random_layer(
    d_in: int, d_out: int, rank: int, scale: float, tau: float, draw: torch.Generator
) -> Layer:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return Layer(
        0.2 * normal(rank, d_in), 0.2 * normal(d_out, rank), tau * normal(rank), scale, tau
    )


def threshold(t: float, p0: float, t_end: float) -> float:
    return 1.0 if t > t_end else 1 - (1 - p0) * (1 + math.cos(math.pi * t / t_end)) / 2


@dataclass
class Ranks:
    gamma: list[float]
    rank: list[Any]
    before: list[Any]


def pruned(all_scores: Mapping[str, Sequence[float]], p: float) -> dict[str, set[int]]:
    """Global choice: sorted descending, the first index whose cumulative sum exceeds p * M * r, and all behind it.

    A linear loses at most half of its ranks; of those that would go the highest-scoring stay.
    """
    flat = sorted(
        ((-score, place, path, i) for place, (path, own) in enumerate(all_scores.items())
         for i, score in enumerate(own))
    )  # fmt: skip
    limit = p * sum(len(own) for own in all_scores.values())
    found: dict[str, list[int]] = {path: [] for path in all_scores}
    total, behind = 0.0, False
    for negative, _, path, i in flat:
        total -= negative
        behind = behind or total > limit
        if behind:
            found[path].append(i)
    kept = {path: len(own) // 2 for path, own in all_scores.items()}
    return {path: set(own[max(0, len(own) - kept[path]) :]) for path, own in found.items()}


def merge(source: float, target: float, tau: float, how: str) -> float:
    """The logit of both ranks of a pair."""
    if how == "logit":
        return (source + target) / 2
    return tau * math.log((math.exp(source / tau) + math.exp(target / tau)) / 2)


def event(
    state: Mapping[str, Ranks],
    p: float,
    tau: float,
    pairs: Mapping[str, Sequence[tuple[int, int]]],
    how: str = "prob",
) -> dict[str, Ranks]:
    """After the event; `pairs` are the (source, target) that were drawn, checked here to be a legal draw."""
    own = {path: scores(ranks.gamma, tau) for path, ranks in state.items()}
    gone = pruned(own, p)
    after = {}
    for path, ranks in state.items():
        chosen = list(pairs.get(path, ()))
        best = [i for _, i in sorted((-score, i) for i, score in enumerate(own[path]))]
        assert {target for _, target in chosen} == gone[path]
        assert {source for source, _ in chosen} == set(best[: len(gone[path])])
        gamma, rank = list(ranks.gamma), list(ranks.rank)
        for source, target in chosen:
            rank[target] = ranks.before[source]
            gamma[source] = gamma[target] = merge(
                ranks.gamma[source], ranks.gamma[target], tau, how
            )
        after[path] = Ranks(gamma, rank, ranks.before)
    return after
