"""Examples to the tensors a model is called with.

Why right padding: positions then need no repair, and a decoder's hidden states on real tokens are those of the
row alone.

Letters: B rows, T width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramux.data.example import Example
from loramux.data.packing import collate_packed, first_fit


def collate(
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    packing: bool = False,
    max_len: int | None = None,
) -> dict[str, Any]:
    """input_ids, attention_mask, labels (-100 where not supervised) and prompt_mask, all [B, T], and each row's task.

    With `packing`, examples share rows of at most `max_len` tokens (default: the longest example) and the result
    also holds position_ids and segment_ids; its attention_mask is bool [B, 1, T, T]; tasks has an entry per segment.
    """
    if not examples:
        raise ValueError("cannot collate an empty batch")
    if packing:
        lengths = [len(example) for example in examples]
        rows = first_fit(lengths, max_len or max(lengths))
        return collate_packed([[examples[i] for i in row] for row in rows], pad_token_id)
    return _collate_padded(examples, pad_token_id)


def _collate_padded(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    import torch

    shape = (len(examples), max(map(len, examples)))
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    seen = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100, dtype=torch.long)
    prompts = torch.zeros(shape, dtype=torch.bool)
    for b, example in enumerate(examples):
        n = len(example)
        tokens = torch.tensor(example.input_ids)
        ids[b, :n] = tokens
        seen[b, :n] = 1
        labels[b, :n] = torch.where(torch.tensor(example.loss_mask), tokens, -100)
        prompts[b, :n] = torch.tensor(example.prompt_mask)
    return {
        "input_ids": ids,
        "attention_mask": seen,
        "labels": labels,
        "prompt_mask": prompts,
        "tasks": tuple(example.task for example in examples),
    }
