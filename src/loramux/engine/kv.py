"""Keys and values of all sequences, in blocks of a pool whose size is fixed when the engine starts.

Why: sequences grow token by token and end at any time. Blocks of a few tokens, taken from one pool, waste at most one
block per sequence, and can be shared by sequences with a common prefix. Which block belongs to whom is not known here.

Letters: L layers, B blocks, T tokens of a block, G key/value heads, D width of a head, P numbers side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux.ops.paged import make_pools

BLOCK_SIZE = 16


@dataclass(frozen=True)
class KVShape:
    """What one layer stores for a token. `value_dim` differs from `key_dim` in a few families only."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


class KVPool:
    """Per layer, keys [B, G, D / P, T, P] and values [B, G, T / P, D, P] (see ops/paged.py). Blocks are never cleared:
    what a sequence has not written may be anything, NaN included, and whoever reads must stop at the sequence's
    length.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if not shapes:
            raise ValueError("a KV pool needs at least one layer; this model has no attention")
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a KV pool needs at least one block of one token, got {num_blocks} blocks of {block_size}; "
                "give the engine more KV memory"
            )
        self.shapes, self.num_blocks, self.block_size = tuple(shapes), num_blocks, block_size
        self.dtype, self.device = dtype, torch.device(device)
        pools = [
            make_pools(
                num_blocks, shape.heads, block_size, shape.key_dim, shape.value_dim, dtype, device
            )
            for shape in shapes
        ]
        self.keys_LBGDTP = [keys for keys, _ in pools]
        self.values_LBGTDP = [values for _, values in pools]

    @staticmethod
    def block_bytes(
        shapes: Sequence[KVShape], block_size: int = BLOCK_SIZE, dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes of one block, over all layers."""
        return block_size * dtype.itemsize * sum(shape.numbers for shape in shapes)

    @classmethod
    def num_blocks_for(
        cls,
        budget_bytes: int,
        shapes: Sequence[KVShape],
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """How many blocks fit a budget. Raises ValueError where not even one does."""
        per_block = cls.block_bytes(shapes, block_size, dtype)
        num_blocks = budget_bytes // per_block
        if num_blocks < 1:
            raise ValueError(
                f"{budget_bytes:,} bytes hold no block of {block_size} tokens, which takes {per_block:,}; "
                "give the engine more KV memory"
            )
        return num_blocks

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes(self.shapes, self.block_size, self.dtype)

    @property
    def num_slots(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in all layers. No block may be written twice, or both read and written."""
        if not pairs:
            return
        source, target = zip(*pairs, strict=True)
        if len({*target}) < len(target) or {*source} & {*target}:
            raise ValueError(
                f"copies {list(pairs)} read or write a block that another one writes; copy in several calls"
            )
        from_P = torch.tensor(source, device=self.device)
        to_P = torch.tensor(target, device=self.device)
        for tensor in (*self.keys_LBGDTP, *self.values_LBGTDP):
            tensor[to_P] = tensor[from_P]
