"""Attention over the KV pool, for a packed row of tokens from many sequences, in a model that knows nothing of it.

A function registered with transformers finds the current step at the attention module that calls it (not in a keyword
of the model call: not every family hands those on). It first writes the new keys and values into the pool, then
attends: rows that are decoded in one call for all sequences, pieces of prompts one after the other. No sequence's
result depends on which others run with it.

Letters: N tokens of the step, H query heads, G key/value heads, D head width, C tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loramux.engine.kv import KVPool
from loramux.engine.probe import ModelShape, configs_of
from loramux.engine.sequence import Chunk, StepPlan
from loramux.ops.paged import LayerKV, PagedRows, Piece, attend

NAME = "loramux_paged"


class Paging:
    """Ties a model to a pool. Between steps the model has its own attention back."""

    def __init__(self, model: nn.Module, shape: ModelShape, pool: KVPool):
        if list(pool.shapes) != shape.kv:
            raise ValueError(
                "the KV pool was made for another model: its layers store other shapes; "
                "make it from probe_model(model).kv"
            )
        AttentionInterface.register(NAME, paged_attention)
        self.pool = pool
        self.rows: PagedRows | None = None
        self._configs = configs_of(model)
        self._own: list[str | None] | None = None
        self._sites = shape.layers
        self._modules = [site.module for site in shape.layers]
        self._layers: dict[int, list[Layer]] = {}  # of each pool that was served, by its id
        self._seen: KVPool | None = None
        self._see(pool)

    def begin(self, plan: StepPlan) -> None:
        """Copies the blocks that the plan wants copied and takes over attention, until `end`."""
        self.pool.copy(plan.copies)
        self.serve(lay_out(plan.chunks, self.pool))

    def _see(self, pool: KVPool) -> None:
        """The model's attention reads and writes this pool from now on. A pool that was seen must live on."""
        if pool is self._seen:
            return
        layers = self._layers.get(id(pool))
        if layers is None:
            places = zip(self._sites, pool.keys_LBGDTP, pool.values_LBGTDP, strict=True)
            layers = self._layers[id(pool)] = [
                Layer(self, LayerKV(keys, values, site.scale, site.window, site.softcap))
                for site, keys, values in places
            ]
        for module, layer in zip(self._modules, layers, strict=True):
            vars(module)[NAME] = layer
        self._seen = pool

    def serve(self, rows: PagedRows, pool: KVPool | None = None) -> None:
        """Takes over attention for a forward of these rows, until `end`. pool: another than its own."""
        self._see(pool or self.pool)
        self.rows = rows
        if self._own is None:
            self._own = [config._attn_implementation for config in self._configs]
            for config in self._configs:
                config._attn_implementation = NAME

    def end(self) -> None:
        """The model attends as it did before."""
        self.rows = None
        if self._own is None:
            return
        for config, own in zip(self._configs, self._own, strict=True):
            config._attn_implementation = own
        self._own = None

    def close(self) -> None:
        """Leave no trace in the model."""
        self.end()
        for module in self._modules:
            vars(module).pop(NAME, None)


@dataclass(frozen=True, eq=False)
class Layer:
    """What an attention module of the model is given to find its part of the pool."""

    paging: Paging
    kv: LayerKV


def lay_out(chunks: Sequence[Chunk], pool: KVPool) -> PagedRows:
    """Which rows of a step are whose: built once, used by all layers. Chunks of one token are decodes."""
    slots: list[np.ndarray[Any, Any]] = []
    row_S: list[int] = []
    length_S: list[int] = []
    begin_S, blocks, pieces = [0], [], []
    size, row = pool.block_size, 0
    for chunk in chunks:
        end = chunk.start + chunk.count
        own = chunk.sequence.blocks[: -(-end // size)]
        if len(own) * size < end:
            raise ValueError(
                f"{len(own)} blocks of {size} tokens cannot hold {end} tokens of {chunk.sequence.request.id}"
            )
        if chunk.count == 1:
            slots.append(np.array([own[chunk.start // size] * size + chunk.start % size]))
            row_S.append(row)
            length_S.append(end)
            blocks += own
            begin_S.append(len(blocks))
        else:
            place = np.arange(chunk.start, end)
            slots.append(np.asarray(own)[place // size] * size + place % size)
            pieces.append(Piece(row, row + chunk.count, chunk.start, _int32(own, pool.device)))
        row += chunk.count
    return PagedRows(
        torch.from_numpy(np.concatenate(slots)).to(pool.device),
        _int32(row_S),
        _int32(length_S),
        _int32(begin_S),
        _int32(blocks, pool.device),
        tuple(pieces),
    )


def _int32(numbers: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """What transformers calls. Scale, window and softcap are those that the probe saw."""
    layer: Layer = vars(module)[NAME]
    rows = layer.paging.rows
    assert rows is not None, "attention was left set to the engine's outside a step"
    return attend(query, key, value, layer.kv, rows), None
