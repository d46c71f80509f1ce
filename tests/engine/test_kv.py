"""The KV pool keeps its budget and copies whole blocks."""

from __future__ import annotations

import pytest
import torch

from loramux.engine.kv import KVPool, KVShape

SHAPES = [KVShape(2, 8, 8), KVShape(1, 8, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_takes_as_many_bytes_as_it_says(dtype: torch.dtype) -> None:
    pool = KVPool(SHAPES, 5, 16, dtype)
    tensors = [*pool.keys_LBGDTP, *pool.values_LBGTDP]
    assert pool.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert pool.num_slots == 80


def test_as_many_blocks_as_fit_the_budget_are_made() -> None:
    block = KVPool.block_bytes(SHAPES, 16, torch.bfloat16)
    assert block == 16 * 2 * (2 * 16 + 12)
    assert KVPool.num_blocks_for(7 * block + block - 1, SHAPES, 16, torch.bfloat16) == 7


def test_a_budget_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="1,000 bytes hold no block of 16 tokens"):
        KVPool.num_blocks_for(1000, SHAPES, 16, torch.float32)


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_without_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        KVPool(SHAPES, num_blocks)


def test_a_model_without_attention_has_no_pool() -> None:
    with pytest.raises(ValueError, match="no attention"):
        KVPool([], 4)


def test_copying_moves_blocks_of_all_layers_and_no_other() -> None:
    pool = KVPool(SHAPES, 6, 16)
    tensors = [*pool.keys_LBGDTP, *pool.values_LBGTDP]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in tensors]
    pool.copy([(0, 3), (0, 4), (5, 1)])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old[[0, 5, 2, 0, 0, 5]])


def test_copies_that_depend_on_each_other_are_refused() -> None:
    pool = KVPool(SHAPES, 6, 16)
    for pairs in ([(0, 1), (1, 2)], [(0, 2), (1, 2)]):
        with pytest.raises(ValueError, match="copy in several calls"):
            pool.copy(pairs)
