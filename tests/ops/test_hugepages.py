"""Copies in huge pages are copies, aligned, and stay as long as one of them is used."""

from __future__ import annotations

import gc

import torch

from loramux.ops.hugepages import HUGE, copies, empty_bytes


def test_an_area_is_aligned_and_empty() -> None:
    area = empty_bytes(3 * HUGE + 5)
    assert area.shape == (3 * HUGE + 5,) and not bool(area.any())
    assert area.data_ptr() % HUGE == 0 and empty_bytes(0).shape == (0,)


def test_copies_are_equal_contiguous_and_outlive_each_other() -> None:
    given = [
        torch.randn(33, 7),
        torch.randn(5, 6).bfloat16().T,
        torch.zeros(0, 4),
        torch.arange(3, dtype=torch.int32),
    ]
    made = copies(given)
    for tensor, copy in zip(given, made, strict=True):
        assert torch.equal(tensor, copy) and copy.dtype is tensor.dtype
        assert copy.is_contiguous() and copy.data_ptr() % 64 == 0
    last = made.pop()
    del made, copy
    gc.collect()
    assert last.tolist() == [0, 1, 2]
