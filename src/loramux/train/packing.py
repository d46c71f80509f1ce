"""May this model train on packed rows? Asked once, before the first step.

Why a trial and not a list of families: a packed call has no mask of its own. The model must derive one from positions
that start again; one that builds its mask without them lets samples see each other, and nothing in the loss shows it.

The trial: a sample behind another one must give the logits it gives alone, and the same ones whatever stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loramux.data import Example, collate
from loramux.errors import LoramuxError
from loramux.train.loss import forward_inputs

if TYPE_CHECKING:
    from loramux.api import Handle

TRIAL_TOKENS = 12
# Alone and packed are calls of other shapes, so they round differently: half precision by 0.03 after 30 layers. What
# stands before a sample changes nothing at all, where it is not seen.
TOLERANCE, HALF_TOLERANCE, BESIDE_TOLERANCE = 1e-3, 0.2, 1e-2


class PackingError(LoramuxError):
    """Packed samples would see each other."""


def check_packing(model: nn.Module, handle: Handle, examples: Sequence[Example]) -> None:
    """Refuse a base whose samples see each other in a packed row; mode and adapter in use stay as they were."""
    before, active = model.training, handle.dispatch.active
    handle.use(None)
    model.eval()
    try:
        from_alone, from_beside = _distances(model, examples)
    finally:
        model.train(before)
        handle.use(active)
    half = next(model.parameters()).dtype.itemsize < 4
    near = from_alone <= (HALF_TOLERANCE if half else TOLERANCE)
    if not (near and from_beside <= (BESIDE_TOLERANCE if half else TOLERANCE)):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise PackingError(
            f"a model of type {kind!r} cannot train on packed rows: its samples would see each other "
            f"(their logits change by {max(from_alone, from_beside):.0%}); set data.packing: false"
        )


@torch.no_grad()
def _distances(model: nn.Module, examples: Sequence[Example]) -> tuple[float, float]:
    """How far the second sample of a packed row is from itself alone, and from itself behind another first one."""
    first, other, second = _samples(examples)
    alone_TV = _logits(model, [second])
    packed_TV = _logits(model, [first, second])
    beside_TV = _logits(model, [other, second])
    return _distance(alone_TV, packed_TV), _distance(packed_TV, beside_TV)


def _samples(examples: Sequence[Example]) -> list[Example]:
    """Drawn from the data's own tokens, so that none of them means something special to the model."""
    pool = sorted({token for example in examples[:16] for token in example.input_ids})
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(pool)[torch.randint(len(pool), (3, TRIAL_TOKENS), generator=generator)]
    supervised = [False] + [True] * (TRIAL_TOKENS - 1)
    return [Example.build("trial", row, supervised) for row in ids.tolist()]


def _logits(model: nn.Module, samples: Sequence[Example]) -> Tensor:
    """Logits [T, V] of the last sample; of several, in one packed row."""
    packing = len(samples) > 1
    batch = collate(samples, 0, packing=packing, max_len=TRIAL_TOKENS * len(samples))
    inputs = forward_inputs(batch, next(model.parameters()).device)
    logits: Tensor = model(**inputs, use_cache=False).logits[0, -TRIAL_TOKENS:]
    return logits.double()


def _distance(one_TV: Tensor, two_TV: Tensor) -> float:
    """Relative to the spread of the logits, at the median position: single ones may round to another expert."""
    centred_TV = one_TV - one_TV.mean(-1, keepdim=True)
    return float(((one_TV - two_TV).norm(dim=-1) / centred_TV.norm(dim=-1)).median())
