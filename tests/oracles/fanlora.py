"""FanLoRA's placement in the open: a module switch per linear, its ablation score, and the choice per layer.

The scoring rule is a reconstruction, the paper's is not known; what is restated here is ours.
Letters: L layers. Layout: `{module path: LowRank}` as in `oracles.lora`, switches `{path: 0 or 1}`.

y = x W + c s x A B      I = S(M) - S(M without it) + S(base with it alone)
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oracles.lora import LowRank, oracle_logits


class Batch(NamedTuple):
    ids: Tensor
    mask: Tensor
    labels: Tensor


@torch.no_grad()
def score(model: nn.Module, batch: Batch, params: Mapping[str, LowRank]) -> float:
    """S = minus the mean cross-entropy over response tokens, of the model with these modules."""
    logits = oracle_logits(model, batch.ids, batch.mask, params)
    log_p = logits[:, :-1].float().log_softmax(-1).double()
    target = batch.labels[:, 1:]
    rows = [
        log_p[b, t, target[b, t]]
        for b in range(target.shape[0])
        for t in range(target.shape[1])
        if target[b, t] != -100
    ]
    return float(torch.stack(rows).mean())


def importance(
    model: nn.Module, batch: Batch, params: Mapping[str, LowRank]
) -> dict[str, tuple[float, float]]:
    """(what is lost without the module, what it scores alone)."""
    full = score(model, batch, params)
    found = {}
    for path in params:
        others = {name: expert for name, expert in params.items() if name != path}
        found[path] = full - score(model, batch, others), score(model, batch, {path: params[path]})
    return found


def best_of_each_layer(scores: Mapping[str, float], n_keep: int) -> set[str]:
    """Paths of the `n_keep` highest of each layer, a layer being what the number in a path says."""
    layers: dict[int, list[str]] = {}
    for path in scores:
        layers.setdefault(next(int(p) for p in path.split(".") if p.isdigit()), []).append(path)
    kept: set[str] = set()
    for paths in layers.values():
        kept |= set(sorted(paths, key=lambda path: -scores[path])[:n_keep])
    return kept


def parameters(shapes: Mapping[str, tuple[int, int]], kept: set[str], rank: int) -> int:
    return sum(rank * (shapes[path][0] + shapes[path][1]) for path in kept)
