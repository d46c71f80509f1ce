"""One training example: token ids with the two masks every other part relies on.

Why a tuple type: examples are shuffled, packed and cached; nothing may change them in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """`loss_mask` marks the supervised tokens; `prompt_mask` marks what a router may read.

    The prompt is every position before the first supervised token, so nothing the model is to produce
    can reach the routing.
    """

    task: str
    input_ids: tuple[int, ...]
    prompt_mask: tuple[bool, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.input_ids) == len(self.prompt_mask) == len(self.loss_mask):
            raise ValueError("input_ids, prompt_mask and loss_mask must be equally long")
        if not any(self.loss_mask):
            raise ValueError("an example needs at least one supervised token")
        start = self.loss_mask.index(True)
        if start == 0:
            raise ValueError("an example needs at least one token before the first supervised one")
        if not all(self.prompt_mask[:start]) or any(self.prompt_mask[start:]):
            raise ValueError(
                "prompt_mask must cover exactly what precedes the first supervised token"
            )

    @classmethod
    def build(cls, task: str, input_ids: Sequence[int], loss_mask: Sequence[bool]) -> Example:
        """The prompt mask follows from the loss mask."""
        supervised = tuple(bool(flag) for flag in loss_mask)
        start = supervised.index(True) if True in supervised else len(supervised)
        prompt = tuple(i < start for i in range(len(supervised)))
        return cls(task, tuple(input_ids), prompt, supervised)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return sum(self.loss_mask)
