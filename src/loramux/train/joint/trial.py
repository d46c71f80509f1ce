"""May rows of several jobs share a call of this base? Asked once, before the first round.

Why a trial and not a list of families: a model that works out its masks, positions or norms in another way than most
would let jobs see each other, and nothing in the losses shows it. Two blocks of unlike shape must give the logits that
each gives alone. One that does not is trained by turns, which needs nothing of the base.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loramux.train.joint.attention import RowAttention, RowBlock
from loramux.train.packing import HALF_TOLERANCE, TOLERANCE

if TYPE_CHECKING:
    from loramux.api import Handle

SHAPES = ((2, 7), (1, 12))
BY_LENGTH = ("dynamic", "longrope")  # rotations that depend on the longest row of a call


def why_not_joint(model: nn.Module, handle: Handle) -> str:
    """Empty if jobs may share calls, else the reason; mode and adapter in use stay as they were."""
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") in BY_LENGTH:
        return f"the rotations of {kind!r} depend on the longest row of a call"
    before, active = model.training, handle.dispatch.active
    handle.use(None)
    model.eval()
    try:
        distance = _distance(model)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        return f"a model of type {kind!r} does not attend through transformers' interface ({error})"
    finally:
        model.train(before)
        handle.use(active)
    half = next(model.parameters()).dtype.itemsize < 4
    if not distance <= (HALF_TOLERANCE if half else TOLERANCE):
        return f"rows of several jobs would see each other in a model of type {kind!r}"
    return ""


@torch.no_grad()
def _distance(model: nn.Module) -> float:
    """How far the logits of blocks in one call are from those of each alone, relative to their spread."""
    weight = next(model.parameters())
    vocab = int(getattr(getattr(model, "config", None), "vocab_size", 64))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab, shape, generator=generator).to(weight.device) for shape in SHAPES]
    masks = [torch.ones_like(rows) for rows in ids]
    masks[0][0, -3:] = 0
    blocks = [
        RowBlock(shape, mask, None, nullcontext) for shape, mask in zip(SHAPES, masks, strict=True)
    ]
    positions = [torch.arange(t, device=weight.device).repeat(b) for b, t in SHAPES]
    with RowAttention(model).over(blocks):
        flat = torch.cat([rows.reshape(-1) for rows in ids])
        joint = _logits(model, flat[None], torch.ones_like(flat)[None], torch.cat(positions)[None])
    first, worst = 0, 0.0
    for rows, mask in zip(ids, masks, strict=True):
        alone = _logits(model, rows, mask, None).flatten(0, 1)
        own = joint[0, first : first + alone.shape[0]]
        first += alone.shape[0]
        spread = alone - alone.mean(-1, keepdim=True)
        away = (alone - own).norm(dim=-1) / spread.norm(dim=-1)
        # At the median position: single ones may round to another expert of a base that is a mixture.
        worst = max(worst, float(away[mask.reshape(-1).bool()].median()))
    return worst


def _logits(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    given = {} if positions is None else {"position_ids": positions}
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, **given)
    logits: Tensor = output.logits
    return logits.double()
