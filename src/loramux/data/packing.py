"""Several examples in one row, each blind to the others.

Why: short rows padded to the longest waste most of a batch. Packed rows need three things to be the same
computation as separate ones: positions that restart, a mask that is causal inside each segment and closed
between them, and a prompt mask per segment.

Letters: B rows, T width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loramux.data.example import Example
from loramux.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def first_fit(lengths: Sequence[int], max_len: int) -> list[list[int]]:
    """Indices by row, no row over `max_len`: longest first, each into the first row with room.

    Ties keep their order, so the result depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > max_len:
        raise DataError(
            f"an example of {lengths[order[0]]} tokens does not fit a packed row of {max_len}; "
            "raise sequence_len"
        )
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        for row, free in enumerate(room):
            if free >= lengths[i]:
                rows[row].append(i)
                room[row] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(max_len - lengths[i])
    return rows


def collate_packed(rows: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Any]:
    """One row per list of examples; see the package docstring for the keys.

    `segment_ids` count from 0 in each row, -1 on padding. A padding position sees itself only: a query that
    sees nothing would turn into NaN.
    """
    import torch

    width = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, -100, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1, dtype=torch.long)
    prompts = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = 0
        for segment, example in enumerate(row):
            span = slice(at, at + len(example))
            tokens = torch.tensor(example.input_ids)
            ids[b, span] = tokens
            labels[b, span] = torch.where(torch.tensor(example.loss_mask), tokens, -100)
            positions[b, span] = torch.arange(len(example))
            segments[b, span] = segment
            prompts[b, span] = torch.tensor(example.prompt_mask)
            at += len(example)
    return {
        "input_ids": ids,
        "attention_mask": segment_mask(segments),
        "labels": labels,
        "prompt_mask": prompts,
        "position_ids": positions,
        "segment_ids": segments,
        "tasks": _tasks(rows),
    }


def _tasks(rows: Sequence[Sequence[Example]]) -> tuple[str | None, ...]:
    """Row after row, every row with as many entries as the fullest has segments: None where it has fewer."""
    most = max(map(len, rows))
    return tuple(
        row[segment].task if segment < len(row) else None for row in rows for segment in range(most)
    )


def segment_mask(segments_BT: Tensor) -> Tensor:
    """[B, 1, T, T] bool, True where a query may look: causal, inside its own segment."""
    import torch

    width = segments_BT.shape[1]
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments_BT.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=segments_BT.device)
    padding = (segments_BT < 0)[:, :, None]
    return torch.where(padding, itself, same & causal)[:, None]
