"""Attention in a row that holds the rows of several jobs: each job's attend as they would in a call of their own.

Why not one block mask over the whole row: it costs the square of all tokens, and would make a job's numbers depend on
its neighbours' lengths. Here the model's own mask and attention functions are called once per job with the shapes of
that job alone, so nothing is padded to anybody else's length.

The mask that transformers asks for is made by a function registered under NAME; it finds the rows of the running call
at the config, and gives a `RowMasks` that travels through the layers in place of a tensor.

Letters: B rows of one job, T tokens per row, N tokens of the call, H heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import and_masks, packed_sequence_mask_function

from loramux.train.attention import fastest_attention

NAME = "loramux_rows"
DROPOUTS = ("attention_dropout", "attn_pdrop")  # what configs call it


@dataclass(frozen=True, eq=False)
class RowBlock:
    """The rows of one job: [B, T], 0 in `mask_BT` where a token is padding, or segments of packed rows.

    draws: None for the rows of several jobs, which is only right where attention draws nothing.
    """

    shape: tuple[int, int]
    mask_BT: Tensor | None
    segment_BT: Tensor | None
    draws: Callable[[], AbstractContextManager[None]] | None

    @property
    def num_tokens(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Call:
    """One model call: whose rows it holds, and the attention that the model has by itself."""

    blocks: tuple[RowBlock, ...]
    own: str


@dataclass(frozen=True, eq=False)
class RowMasks:
    """What a layer gets as its attention mask: one per job, as the model's own functions make them."""

    call: Call
    masks: tuple[Any, ...]


class RowAttention:
    """Lets a model attend by jobs inside `over`; outside it is as it was."""

    def __init__(self, model: nn.Module):
        AttentionInterface.register(NAME, attend_by_rows)
        AttentionMaskInterface.register(NAME, masks_by_rows)
        self._configs = _configs_of(model)
        self._draws = any(getattr(c, name, 0) for c in self._configs for name in DROPOUTS)

    @contextmanager
    def over(self, blocks: Sequence[RowBlock]) -> Iterator[None]:
        """Model calls inside hold one row with these blocks, one behind the other."""
        before = [config._attn_implementation for config in self._configs]
        call = tuple(blocks if self._draws else merged(blocks))
        try:
            for config, own in zip(self._configs, before, strict=True):
                vars(config)[NAME] = Call(call, own or "sdpa")
                config._attn_implementation = NAME
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation = own
                vars(config).pop(NAME, None)


def merged(blocks: Sequence[RowBlock]) -> list[RowBlock]:
    """Neighbours of one length as one block: attention works on each row by itself, and a call costs much by itself."""
    found: list[RowBlock] = []
    for block in blocks:
        last = found[-1] if found else None
        if last is not None and last.shape[1] == block.shape[1]:
            masks = [m for m in (last.mask_BT, block.mask_BT) if m is not None]
            if len(masks) == 2 and last.segment_BT is None and block.segment_BT is None:
                shape = (last.shape[0] + block.shape[0], block.shape[1])
                found[-1] = RowBlock(shape, torch.cat(masks), None, None)
                continue
        found.append(block)
    return found


def _configs_of(model: nn.Module) -> list[Any]:
    """Every config object that an attention module of this model may ask for its implementation."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def masks_by_rows(*, config: Any, mask_function: Any, device: Any, **given: Any) -> RowMasks:
    """What transformers calls for a mask; the rule (causal, a window, ...) is the model's own."""
    call: Call = vars(config)[NAME]
    make = AttentionMaskInterface()[call.own]
    masks = []
    for block in call.blocks:
        own = {**given, "batch_size": block.shape[0], "attention_mask": block.mask_BT}
        own["q_length"] = own["kv_length"] = block.shape[1]
        rule = mask_function
        if block.segment_BT is not None:
            rule = and_masks(rule, packed_sequence_mask_function(block.segment_BT.to(device)))
            own |= {"attention_mask": None, "allow_is_causal_skip": False}
        elif block.mask_BT is not None:
            own["attention_mask"] = block.mask_BT.to(device, torch.bool)
        masks.append(make(mask_function=rule, device=device, config=config, **own))
    return RowMasks(call, tuple(masks))


def attend_by_rows(
    module: nn.Module,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: RowMasks,
    *,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: the model's own attention, once per job. Gives [1, N, H, D]."""
    given.pop("position_ids", None)  # of the whole row; kernels for packed rows would read them
    call = attention_mask.call
    sizes = [block.num_tokens for block in call.blocks]
    attend = _own_attention(module, call.own)
    out = []
    parts = (x_1HND.split(sizes, dim=2) for x_1HND in (query_1HND, key_1HND, value_1HND))
    for block, mask, *qkv in zip(call.blocks, attention_mask.masks, *parts, strict=True):
        rows = [_unflatten(part, block.shape) for part in qkv]
        if dropout > 0 and block.draws is None:
            raise RuntimeError(
                f"{type(module).__name__} draws numbers that its config does not name"
            )
        draws = block.draws() if dropout > 0 and block.draws is not None else nullcontext()
        with draws, fastest_attention(query_1HND.device, query_1HND.dtype, block.shape[1]):
            y_BTHD, _ = attend(module, *rows, mask, dropout=dropout, **given)
        out.append(y_BTHD.reshape(1, block.num_tokens, *y_BTHD.shape[2:]))
    return torch.cat(out, dim=1), None


def _unflatten(part_1HND: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, H, T, D] of one job's [1, H, B * T, D]; a view."""
    part: Tensor = part_1HND[0].unflatten(1, shape)
    return part.transpose(0, 1)


def _own_attention(module: nn.Module, name: str) -> Any:
    """The function a model would have called: registered by name, or beside the attention module's class (eager)."""
    registered = AttentionInterface()
    if name in registered:
        return registered[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
