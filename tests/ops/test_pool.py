"""The group call equals a loop over pairs, in every instruction set this CPU has and without a compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux.ops.contract import Pairs, RowMap
from loramux.ops.pool import Member, bind_group, group_linear, max_rows
from ops.cases import assert_close
from ops.pool_cases import (
    loop,
    pack,
    random_group,
    random_pairs,
)
from ops.variants import DTYPES, check, compiled, run, variant

__all__ = ["compiled", "variant"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_rows=st.integers(1, 9),
    d_in=st.integers(1, 70),
    d_outs=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    dora=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_group_equals_the_loop(
    variant: str, num_rows: int, d_in: int, d_outs: list[int], dora: bool, bias: bool, seed: int
) -> None:
    check(random_group(num_rows, d_in=d_in, d_outs=d_outs, dora=dora, bias=bias, seed=seed))


@pytest.mark.parametrize("num_rows", [1, 5, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_in", "d_outs"), [(64, (48, 16, 80)), (96, (200, 33)), (50, (37,)), (32, (2100, 16))]
)
def test_any_number_of_rows_and_any_width_works(
    variant: str, num_rows: int, dtype: torch.dtype, d_in: int, d_outs: tuple[int, ...]
) -> None:
    check(random_group(num_rows, d_in=d_in, d_outs=d_outs, dtype=dtype, dora=True))


def test_pairs_may_read_and_write_different_rows(variant: str) -> None:
    group = random_group(6)
    group.pairs = [random_pairs(6, 6, 15, n, same=False) for n in range(3)]
    check(group)


def test_pairs_of_one_slot_and_weights_per_rank_work(variant: str) -> None:
    group = random_group(8)
    pairs = group.pairs[0]
    assert pairs is not None
    group.pairs[0] = replace(pairs, slot=torch.full_like(pairs.slot, 1), cache={})
    check(group)
    gates = torch.rand(pairs.num_pairs, 20)
    plain = run(group)[0]
    group.pairs[0] = replace(group.pairs[0], rank_weight=torch.ones_like(gates), cache={})
    assert_close(run(group)[0], plain.double())
    group.pairs[0] = replace(group.pairs[0], rank_weight=0 * gates, cache={})
    bare = replace(group.pairs[0], weight=torch.zeros(pairs.num_pairs), cache={})
    want = run(replace(group, pairs=[bare, None, None]))[0]
    assert_close(run(group)[0], want.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ["enter", "exit"])
@pytest.mark.parametrize("token", [[0, 0, 0, 1, 1, 2], [2, 0, 1, 0]])
@pytest.mark.parametrize("dora", [False, True])
def test_rows_enter_and_leave(
    variant: str, token: list[int], role: str, dtype: torch.dtype, dora: bool
) -> None:
    num_tokens, num_rows = max(token) + 1, len(token)
    group = random_group(num_tokens if role == "enter" else num_rows, dtype=dtype, dora=dora)
    token_M, row_M = torch.tensor(token, dtype=torch.int32), torch.arange(num_rows).int()
    rows = RowMap(token_M, torch.rand(num_rows), num_tokens)
    slot_M = (row_M % 6 - 1).int()
    if role == "enter":
        group.enter = rows
        pairs = Pairs(token_M, row_M, slot_M, torch.rand(num_rows), num_tokens, num_rows)
    else:
        group.exit = rows
        pairs = Pairs(row_M, token_M, slot_M, torch.rand(num_rows), num_rows, num_tokens)
    group.pairs = [pairs, None, pairs]
    check(group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_in", [64, 50])
def test_a_row_alone_equals_itself_in_a_batch_bit_for_bit(
    compiled: str, dtype: torch.dtype, d_in: int
) -> None:
    group = random_group(40, d_in=d_in, d_outs=(48, 37, 2100), dtype=dtype, dora=True)
    group.pairs[2] = group.pairs[0]
    together = run(group)
    for token in (0, 7, 16, 39):
        for alone, row in zip(run(group.alone(token)), together, strict=True):
            assert torch.equal(alone[0], row[token])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_nan_leaves_the_others_bit_equal(compiled: str, dtype: torch.dtype) -> None:
    group = random_group(9, dtype=dtype)
    want = run(group)
    group.x[4] = float("nan")
    others = torch.arange(9) != 4
    for got, before in zip(run(group), want, strict=True):
        assert bool(got[4].isnan().all()) and torch.equal(got[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(compiled: str, dtype: torch.dtype) -> None:
    group = random_group(11, d_outs=(48, 200, 37), dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(run(group))
        finally:
            torch.set_num_threads(1)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_bound_call_sees_slots_and_weights_that_were_written_in_place(variant: str) -> None:
    group = random_group(4)
    pairs = group.pairs[0]
    assert pairs is not None
    bound = bind_group(group.members, group.table, group.pairs)
    first = bound(group.x)
    assert all(torch.equal(a, b) for a, b in zip(first, run(group), strict=True))
    pairs.slot.copy_(torch.tensor([1, 0, 3, 5, -1, 4, 1, 0]))
    pairs.weight.mul_(-2)
    widths = [(m.weight.shape[1], m.weight.shape[0]) for m in group.members]
    group.table.put([0], pack(widths, [[2, 5, 7]], seed=9))
    again = bound(group.x)
    assert not torch.equal(again[0], first[0])
    for got, want in zip(again, loop(group), strict=True):
        assert_close(got, want)


def test_outputs_are_new_and_keep_the_leading_dimension(variant: str) -> None:
    group = random_group(3)
    bound = bind_group(group.members, group.table, group.pairs)
    one, two = bound(group.x.unsqueeze(0)), bound(group.x.unsqueeze(0))
    assert [tuple(y.shape) for y in one] == [(1, 3, 48), (1, 3, 16), (1, 3, 80)]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(one, two, strict=True))
    enter = RowMap(torch.tensor([0, 0, 1, 2], dtype=torch.int32), torch.ones(4), 3)
    (y,) = group_linear(group.x.unsqueeze(0), group.members[:1], None, [None], enter=enter)
    assert tuple(y.shape) == (1, 4, 48)


def test_strides_of_x_do_not_matter(variant: str) -> None:
    group = random_group(4)
    wide = torch.randn(4, 80)
    group.x = wide[:, :64]
    check(group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_run_in_torch(dtype: torch.dtype) -> None:
    group = random_group(3, dtype=dtype)
    for got, want in zip(run(group), loop(group), strict=True):
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=3e-2)


def test_groups_that_do_not_fit_are_refused() -> None:
    group = random_group(2)
    with pytest.raises(ValueError, match="no gradient"):
        group_linear(torch.zeros(2, 64, requires_grad=True), group.members, None, [None] * 3)
    with pytest.raises(ValueError, match=r"x is \(2, 9\), the weights are \[out, 64\]"):
        group_linear(torch.zeros(2, 9), group.members, group.table, group.pairs)
    other = Member(torch.zeros(4, 9), None, 0)
    with pytest.raises(ValueError, match=r"weight is .*the linears of a group are all"):
        group_linear(group.x, [group.members[0], other], None, [None, None])
    with pytest.raises(ValueError, match="is .* wide in the table, its weight is"):
        group_linear(group.x, [replace(group.members[0], site=1)], group.table, group.pairs[:1])
    with pytest.raises(ValueError, match="give the slot table"):
        group_linear(group.x, group.members[:1], None, group.pairs[:1])


def wrong(**change: object) -> Pairs:
    index = torch.zeros(2, dtype=torch.int32)
    return replace(Pairs(index, index, index, torch.ones(2), 2, 2), **change)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (wrong(src=torch.tensor([0, 2], dtype=torch.int32)), "source row lies outside"),
        (wrong(dst=torch.tensor([0, 9], dtype=torch.int32)), "destination row lies outside"),
        (wrong(slot=torch.tensor([0, 99], dtype=torch.int32)), "slot lies outside the table"),
        (wrong(rank_weight=torch.ones(2, 1)), "fewer columns than a slot has ranks"),
        (wrong(num_src=3), "another number of rows"),
        (wrong(num_dst=1), "another number of rows"),
    ],
)
def test_pairs_that_point_outside_are_an_error_not_a_crash(
    compiled: str, pairs: Pairs, message: str
) -> None:
    group = random_group(2)
    group.pairs = [pairs, None, None]
    with pytest.raises(ValueError, match=message):
        run(group)


def test_a_pair_that_names_an_empty_slot_is_an_error(variant: str) -> None:
    group = random_group(2)
    group.table.clear([1])
    zero = torch.zeros(1, dtype=torch.int32)
    group.pairs = [Pairs(zero, zero, zero + 1, torch.ones(1), 2, 2), None, None]
    with pytest.raises(ValueError, match="holds no adapter"):
        run(group)


def test_the_kernel_says_up_to_how_many_rows_it_is_for(variant: str) -> None:
    group = random_group(2, d_in=64, d_outs=(48, 16), dtype=torch.bfloat16)
    rows = max_rows(group.members)
    assert max_rows([Member(torch.zeros(4, 4).half())]) == 0
    if variant == "torch":
        assert rows == 0
    elif variant == "amx":
        assert rows > 8192 and max_rows(group.members, enters=True) == 128
        assert max_rows([Member(torch.zeros(7, 64).bfloat16())]) == 16
    else:
        assert rows == max_rows(group.members, enters=True) == 16
