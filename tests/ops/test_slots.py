"""The slot table holds what was put, no longer than it is used, and takes nothing malformed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loramux.ops.pool import SlotTable
from ops.pool_cases import (
    mixed_table,
    pack,
)


def test_a_slot_gives_back_the_rows_that_were_put() -> None:
    widths = [(6, 4), (4, 6)]
    packed = pack(widths, [[2, 0], [1, 3]], dora=True)
    table = SlotTable(widths, 3)
    table.put([2, 0], packed)
    a, b, gain, scale = table.rows_of(0, 1)
    start = int(packed.a_at[1, 1])
    assert torch.equal(a, packed.blob[start : start + 48].view(torch.float32).view(3, 4))
    assert b.shape == (3, 6) and gain is not None and gain.shape == (6,) and scale == 1.75
    assert table.rows_of(2, 1)[0].shape == (0, 4)


def test_the_table_keeps_a_blob_alive_until_its_slots_are_cleared() -> None:
    import weakref

    table = SlotTable([(6, 4)], 2)
    packed = pack([(6, 4)], [[2]])
    table.put([1], packed)
    gone = weakref.ref(packed)
    del packed
    assert gone() is not None
    table.clear([1])
    assert gone() is None


def test_what_does_not_fit_the_table_is_refused_with_what_was_given() -> None:
    widths = [(6, 4), (4, 6)]
    table, packed = SlotTable(widths, 2), pack(widths, [[2, 3]])
    with pytest.raises(ValueError, match=r"different ones of 0..1, got \[2\]"):
        table.put([2], packed)
    with pytest.raises(ValueError, match="2 slots of 2 sites .* 1 experts and 2 sites"):
        table.put([0, 1], packed)
    late = replace(packed, b_at=packed.b_at + packed.blob.shape[0])
    with pytest.raises(ValueError, match="B of expert 0 at site 0 is 32 bytes from .* end within"):
        table.put([0], late)
    with pytest.raises(ValueError, match="start at a multiple of 4"):
        table.put([0], replace(packed, a_at=packed.a_at + 2))
    with pytest.raises(ValueError, match="blob must be contiguous bytes"):
        replace(packed, blob=packed.blob.float())
    with pytest.raises(ValueError, match=r"rows are torch.float16; convert"):
        replace(packed, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must all be \[experts, sites\]"):
        replace(packed, scale=np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        SlotTable(widths, 0)
    assert table.held == [None, None]


def test_filling_a_slot_takes_well_under_a_millisecond() -> None:
    import time

    widths = [(8, 8)] * 210
    table, packed = SlotTable(widths, 64), pack(widths, [[1] * 210])
    times = []
    for _ in range(20):
        start = time.perf_counter()
        table.put([5], packed)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_the_table_of_the_tests_holds_unlike_adapters() -> None:
    table = mixed_table([(64, 48), (64, 16)], dora=True)
    ranks = {int(table.rank[0, slot]) for slot in range(6)}
    assert len(ranks) > 3 and set(table.type[0].tolist()) == {0, 1} and bool(table.gain_at.any())
