"""The slot table of a device keeps its books, and the Triton kernels over it are the group call.

Why a process of its own: Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.ops.arena import ALIGN, ArenaTable, Extents
from loramux.ops.pool import Member, apply_many, group_linear
from ops.cases import assert_close
from ops.child import run_child
from ops.pool_cases import Group, fill_mixed, loop, pack, random_group, random_pairs

WIDTHS = [(64, 48), (64, 16), (64, 80)]


def on_device(group: Group, device: str) -> Group:
    """The same group with its adapters in an arena."""
    table = ArenaTable(group.table.widths, group.table.capacity, 1 << 20, device, max_rank=32)
    fill_mixed(table, dora=bool(group.table.gain_at.any()))
    members = [
        Member(m.weight.to(device), None if m.bias is None else m.bias.to(device), m.site)
        for m in group.members
    ]
    pairs = [None if p is None else moved(p, device) for p in group.pairs]
    return replace(group, x=group.x.to(device), members=members, table=table, pairs=pairs)


def moved(value: object, device: str) -> object:
    fields = {
        name: getattr(value, name).to(device)
        for name in ("src", "dst", "slot", "weight", "token")
        if hasattr(value, name)
    }
    return replace(value, **fields, cache={})


def check_kernels(device: str) -> None:
    """Called in a process that has Triton's interpreter, or on a GPU."""
    for dtype in (torch.float32, torch.bfloat16):
        for dora in (False, True):
            group = random_group(5, dtype=dtype, dora=dora, seed=3)
            got = group_linear(**arguments(on_device(group, device)))
            for y, want in zip(got, loop(group), strict=True):
                assert y.dtype is dtype
                assert_close(y.cpu(), want)
    group = random_group(5)
    group.pairs[0] = replace(random_pairs(5, 5, 9), rank_weight=torch.rand(9, 20))
    there = on_device(group, device)
    there.pairs[0].rank_weight = group.pairs[0].rank_weight.to(device)
    want = group_linear(**arguments(group))[0]
    assert_close(group_linear(**arguments(there))[0].cpu(), want.double())
    pairs, y = random_pairs(5, 5, 9, same=False), torch.randn(5, 48)
    want = apply_many(y.clone(), group.x, group.table, 0, pairs)
    got = apply_many(y.to(device), there.x, there.table, 0, moved(pairs, device))
    assert_close(got.cpu(), want.double())


def arguments(group: Group) -> dict[str, object]:
    return {name: getattr(group, name) for name in ("x", "members", "table", "pairs")}


def test_the_kernels_equal_the_loop_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_child("from ops.test_arena import check_kernels; check_kernels('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_equal_the_loop_on_a_gpu() -> None:
    check_kernels("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_call_sees_slots_that_change() -> None:
    group = on_device(random_group(5, dtype=torch.bfloat16), "cuda")
    group_linear(**arguments(group))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_linear(**arguments(group))
    group.table.put([1], pack(group.table.widths, [[9, 2, 5]], seed=8))
    graph.replay()
    for got, want in zip(captured, group_linear(**arguments(group)), strict=True):
        assert torch.equal(got, want)


def test_without_triton_the_arena_is_read_in_torch() -> None:
    group = random_group(5, dora=True)
    for y, want in zip(
        group_linear(**arguments(on_device(group, "cpu"))), loop(group), strict=True
    ):
        assert_close(y, want)


def test_a_slot_gives_back_the_rows_that_were_put() -> None:
    table, packed = ArenaTable(WIDTHS, 3, 1 << 16, "cpu"), pack(WIDTHS, [[2, 0, 5]], dora=True)
    table.put([1], packed)
    packed.blob.zero_()
    a, b, gain, scale = table.rows_of(1, 2)
    assert a.shape == (5, 64) and b.shape == (5, 80) and bool(a.any() and b.any())
    assert gain is not None and bool((gain != 0).all()) and scale == 1.0
    assert int(table.tables["rank"][2, 1]) == 5 and int(table.tables["a_at"][1, 1]) == -1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=30),
)
def test_the_books_hold_whatever_is_put_and_cleared(steps: list[tuple[int, int, bool]]) -> None:
    table = ArenaTable([(8, 8)], 6, 16 * ALIGN, "cpu")
    contents = [pack([(8, 8)], [[rank]] * 2, seed=rank) for rank in range(7)]
    for slot, number, clears in steps:
        slots = [slot, slot + 1]
        if clears:
            table.clear(slots)
        else:
            # A full arena refuses; the books must hold then, too.
            with suppress(ValueError):
                table.put(slots, contents[number])
        table.check_integrity()
    table.clear(list(range(6)))
    table.check_integrity()
    assert table.extents.free == [(0, 16 * ALIGN)] and bool((table.tables["rank"] == -1).all())


def test_what_does_not_fit_is_refused_and_leaves_the_slots_empty() -> None:
    table = ArenaTable([(64, 64)], 2, 4 * ALIGN, "cpu", max_rank=8)
    with pytest.raises(ValueError, match="rank 9 is above the table's max_rank 8"):
        table.put([0], pack([(64, 64)], [[9]]))
    with pytest.raises(ValueError, match="the arena has 1024 of 1024 bytes free and no 4096"):
        table.put([0], pack([(64, 64)], [[8]]))
    assert table.held == [None, None]
    table.check_integrity()


def test_free_neighbours_become_one() -> None:
    extents = Extents(4 * ALIGN)
    starts = [extents.take(ALIGN) for _ in range(4)]
    assert extents.take(1) is None
    for start in (starts[2], starts[0], starts[1]):
        assert start is not None
        extents.give(start, ALIGN)
    assert extents.free == [(0, 3 * ALIGN)] and extents.take(3 * ALIGN) == 0
