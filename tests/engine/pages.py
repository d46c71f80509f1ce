"""Runs sequences through a model over a KV pool, in chunks drawn at random, without scheduler or adapters.

Letters: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Many

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.engine.attention import Paging
from loramux.engine.kv import KVPool
from loramux.engine.probe import probe_model
from loramux.engine.request import Request
from loramux.engine.sequence import Chunk, Sequence, StepPlan


class Pages:
    """A model with a pool around it that is full of NaN to begin with. Blocks are handed out in a random order."""

    def __init__(
        self, model: PreTrainedModel, num_blocks: int = 64, block_size: int = 16, seed: int = 0
    ):
        self.model = model
        self.shape = probe_model(model)
        self.pool = KVPool(self.shape.kv, num_blocks, block_size, model.dtype)
        for tensor in (*self.pool.keys_LBGDTP, *self.pool.values_LBGTDP):
            tensor.fill_(torch.nan)
        self.paging = Paging(model, self.shape, self.pool)
        self.free = random.Random(seed).sample(range(num_blocks), num_blocks)
        self.started = 0

    def start(self, tokens: Many[int]) -> Sequence:
        request = Request(prompt=tuple(tokens), id=str(self.started))
        sequence = Sequence(request, 0, list(tokens), len(tokens), self.started)
        self.started += 1
        need = -(-len(tokens) // self.pool.block_size)
        sequence.blocks = [self.free.pop() for _ in range(need)]
        return sequence

    def step(self, chunks: Many[Chunk], copies: tuple[tuple[int, int], ...] = ()) -> list[Tensor]:
        """Logits [count, V] of every chunk."""
        spans = [(c.sequence.tokens, i) for c in chunks for i in range(c.start, c.start + c.count)]
        self.paging.begin(StepPlan(tuple(chunks), copies))
        try:
            with torch.inference_mode():
                logits: Tensor = self.model(
                    input_ids=torch.tensor([[tokens[i] for tokens, i in spans]]),
                    position_ids=torch.tensor([[i for _, i in spans]]),
                    use_cache=False,
                ).logits[0]
        finally:
            self.paging.end()
        return list(logits.split([c.count for c in chunks]))

    def run(self, sequences: Many[Sequence], counts: Many[int], seed: int = 0) -> list[Tensor]:
        """Logits [T, V] of each, from random pieces of these lengths of all sequences at once."""
        rng = random.Random(seed)
        found: dict[int, list[Tensor]] = {s.order: [] for s in sequences}
        while left := [s for s in sequences if s.num_computed < s.num_tokens]:
            chunks = [
                Chunk(s, s.num_computed, min(rng.choice(counts), s.num_tokens - s.num_computed))
                for s in rng.sample(left, rng.randint(1, len(left)))
            ]
            chunks.sort(key=lambda chunk: chunk.count != 1)
            for chunk, logits in zip(chunks, self.step(chunks), strict=True):
                found[chunk.sequence.order].append(logits)
                chunk.sequence.num_computed += chunk.count
        return [torch.cat(found[s.order]) for s in sequences]


def texts(lengths: Many[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(4, 90) for _ in range(n)] for n in lengths]


def plain(model: PreTrainedModel, tokens: Many[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(
            input_ids=torch.tensor([list(tokens)]), attention_mask=torch.ones(1, len(tokens))
        ).logits
    return logits[0]
