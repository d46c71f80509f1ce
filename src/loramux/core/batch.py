"""Reads off a model call which token belongs to which request and which tokens are prompt.

Letters: B rows of the call, T tokens per row, N = B * T flattened tokens, Q requests (rows, or
segments of packed rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(eq=False)
class Batch:
    """Who is in a model call. All tensors lie on the model's device."""

    lead: tuple[int, int]
    request_N: Tensor
    prompt_N: Tensor
    valid_N: Tensor
    num_requests: int
    past_length: int
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return self.lead[0] * self.lead[1]


def read_batch(
    call: Mapping[str, Any], prompt_mask: Tensor | None, segment_ids: Tensor | None
) -> Batch:
    """`call` holds the model's arguments by name. Raises ValueError on masks whose shape does not fit."""
    tokens = call.get("input_ids")
    if tokens is None:
        tokens = call.get("inputs_embeds")
    if tokens is None:
        raise ValueError("the model was called without input_ids or inputs_embeds")
    b, t = tokens.shape[:2]
    device = tokens.device
    past = call.get("past_key_values")
    past_length = int(past.get_seq_length()) if past is not None else 0
    valid_BT = _valid(call.get("attention_mask"), b, t, past_length, device)
    row_BT = torch.arange(b, device=device).unsqueeze(1).expand(b, t)
    if segment_ids is None and past_length == 0:
        segment_ids = _segments_from_positions(call, t)
    if segment_ids is None:
        request_BT, num_requests = row_BT, b
    else:
        _check_shape("segment_ids", segment_ids, b, t)
        segment_BT = segment_ids.to(device)
        valid_BT = valid_BT & (segment_BT >= 0)
        per_row = int(segment_BT.max().clamp_min(0)) + 1
        request_BT = row_BT * per_row + segment_BT.clamp_min(0)
        num_requests = b * per_row
    request_N, valid_N = request_BT.reshape(-1), valid_BT.reshape(-1)
    if past_length > 0:
        prompt_N = torch.zeros_like(valid_N)
    elif prompt_mask is not None:
        _check_shape("prompt_mask", prompt_mask, b, t)
        prompt_N = prompt_mask.to(device).bool().reshape(-1) & valid_N
    elif call.get("labels") is not None:
        prompt_N = _before_first_label(call["labels"], request_N, num_requests) & valid_N
    else:
        prompt_N = valid_N
    return Batch((b, t), request_N, prompt_N, valid_N, num_requests, past_length, device)


def _valid(mask: Any, b: int, t: int, past_length: int, device: torch.device) -> Tensor:
    """Real tokens, from a two-dimensional mask (its last T columns: earlier ones are in the cache) or a full one."""
    if isinstance(mask, Mapping):  # one per kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if torch.is_tensor(mask) and mask.dim() == 2:
        return mask[:, -t:].to(device).bool()
    if torch.is_tensor(mask) and mask.dim() == 4 and past_length == 0:
        # The model's causal mask, ready made: a token is real if it may look at itself.
        own = mask[:, 0].to(device).diagonal(dim1=1, dim2=2)[:, :t]
        real = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        return real.expand(b, t)
    return torch.ones(b, t, dtype=torch.bool, device=device)


def _segments_from_positions(call: Mapping[str, Any], t: int) -> Tensor | None:
    """Padding-free packing without segment ids: one row, no mask, and positions that start again."""
    positions = call.get("position_ids")
    if positions is None or call.get("attention_mask") is not None or positions.shape[0] != 1:
        return None
    starts: Tensor = positions.reshape(1, -1) == 0
    return starts.long().cumsum(1) - 1 if positions.dim() == 2 and int(starts.sum()) > 1 else None


def _before_first_label(labels: Tensor, request_N: Tensor, num_requests: int) -> Tensor:
    """True at the positions of a request that come before its first supervised token."""
    place_N = torch.arange(request_N.shape[0], device=request_N.device)
    supervised_N = labels.reshape(-1).to(request_N.device) != IGNORED_LABEL
    never = torch.full((num_requests,), request_N.shape[0], device=request_N.device)
    first_Q = never.scatter_reduce(
        0, request_N[supervised_N], place_N[supervised_N], "amin", include_self=True
    )
    return place_N < first_Q[request_N]


def _check_shape(name: str, mask: Tensor, b: int, t: int) -> None:
    if tuple(mask.shape) != (b, t):
        raise ValueError(
            f"{name} must have the shape of input_ids ({b}, {t}), got {tuple(mask.shape)}"
        )


def supervised_share(call: Mapping[str, Any]) -> float | Tensor:
    """This micro-batch's share of the supervised tokens of the whole step; 1 when the step is not split.

    The stock Trainer passes `num_items_in_batch`, counted over labels[:, 1:] of all its micro-batches, and adds up
    their losses: an auxiliary loss must be weighted alike, or it would grow with the number of micro-batches.
    """
    total = call.get("num_items_in_batch")
    labels = call.get("shift_labels")
    if labels is None and call.get("labels") is not None:
        labels = call["labels"][..., 1:]
    if total is None or labels is None:
        return 1.0
    share: Tensor = (labels != IGNORED_LABEL).sum() / total
    return share
