"""What a layer's mask lets a token see, read off the rule by which the model would make it.

Why: a config may name windows that a layer ignores, or chunks that look like windows. The rule itself cannot be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MaskRule = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) -> may look, all tensors
FAR = 1 << 20


@dataclass(frozen=True)
class MaskRecord:
    """Stands for the mask of a layer: the rule, instead of a tensor made by it."""

    rule: MaskRule

    def sees(self, query: int, key: int) -> bool:
        zero = torch.zeros((), dtype=torch.long)
        return bool(self.rule(zero, zero, torch.tensor(query), torch.tensor(key)))


def record_mask(*_: Any, mask_function: MaskRule, **__: Any) -> MaskRecord:
    """A mask function as transformers registers them."""
    return MaskRecord(mask_function)


def window_of(mask: Any, given: int | None) -> int | None:
    """How many tokens a token sees, itself included; None for all before it. `given`: what the layer says of itself.

    Raises ValueError, saying what is in the way, if that is not how the layer masks.
    """
    if not isinstance(mask, MaskRecord):
        raise ValueError(
            "does not get its mask from transformers' mask functions, so the engine cannot tell what a token may see"
        )
    causal = not mask.sees(0, 1) and not mask.sees(FAR, FAR + 1) and mask.sees(FAR, FAR)
    if causal and given is None and mask.sees(FAR, 0):
        return None
    if causal and given is not None:
        # An odd place as well: a rule by chunks of a fixed size looks like a window where a chunk ends.
        for at in (FAR, FAR + 1, FAR + given // 2 + 1):
            causal = causal and mask.sees(at, at - given + 1) and not mask.sees(at, at - given)
        if causal:
            return given
    raise ValueError("is neither causal nor causal within a sliding window")
