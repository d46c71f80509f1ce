"""The group call equals a loop over pairs, in every instruction set this CPU has and without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramux.ops.compiler import runnable_variants
from loramux.ops.contract import Pairs, RowMap
from loramux.ops.gates import LateCall
from loramux.ops.pool import Member, SlotTable, apply_many, bind_group, group_linear, max_rows
from loramux.ops.pool_kernel import kernel
from ops.cases import assert_close
from ops.pool_cases import (
    Group,
    add,
    late_gate,
    loop,
    mixed_table,
    pack,
    random_group,
    random_pairs,
)

VARIANTS = [variant.name for variant in runnable_variants()]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[*VARIANTS, "torch"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from forced(request.param, monkeypatch)


@pytest.fixture(params=VARIANTS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from forced(request.param, monkeypatch)


def forced(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if name == "torch":
        monkeypatch.setenv("LORAMUX_NO_CC", "1")
    else:
        monkeypatch.setenv("LORAMUX_CPU_VARIANT", name)
    kernel.cache_clear()
    if name != "torch" and kernel().group is None:
        pytest.skip(kernel().why_not)
    assert kernel().variant == name
    yield name
    kernel.cache_clear()


def run(group: Group) -> list[Tensor]:
    return group_linear(
        group.x, group.members, group.table, group.pairs, enter=group.enter, exit=group.exit
    )


def check(group: Group) -> None:
    for got, want in zip(run(group), loop(group), strict=True):
        assert got.dtype is group.x.dtype
        assert_close(got, want)


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


# --- The table --------------------------------------------------------------------------------------


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


def test_a_pair_that_names_an_empty_slot_is_an_error(variant: str) -> None:
    group = random_group(2)
    group.table.clear([1])
    zero = torch.zeros(1, dtype=torch.int32)
    group.pairs = [Pairs(zero, zero, zero + 1, torch.ones(1), 2, 2), None, None]
    with pytest.raises(ValueError, match="holds no adapter"):
        run(group)


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


# --- Many rows --------------------------------------------------------------------------------------


def runs(lengths: list[int], slots: list[int], shuffled: bool = False) -> Pairs:
    """Tokens of one request after the other, each with its own slot."""
    n = sum(lengths)
    src = torch.arange(n, dtype=torch.int32)
    if shuffled:
        src = torch.randperm(n, generator=torch.Generator().manual_seed(1)).int()
    slot = torch.cat([torch.full((k,), s) for k, s in zip(lengths, slots, strict=True)]).int()
    return Pairs(src, src, slot, torch.rand(n) + 0.5, n, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("widths", [(64, 48), (96, 80), (50, 37), (32, 144)])
def test_adding_to_many_rows_equals_the_loop(
    variant: str, dtype: torch.dtype, shuffled: bool, widths: tuple[int, int]
) -> None:
    table = mixed_table([widths])
    pairs = runs([70, 1, 33, 5, 20, 64], [1, 0, 3, -1, 5, 1], shuffled)
    x, y = torch.randn(193, widths[0]).to(dtype), torch.randn(193, widths[1]).to(dtype)
    member = Member(torch.zeros(widths[1], widths[0]), None, 0)
    want = add(y.double(), x.double(), member.weight.double(), table, member, pairs)
    got = apply_many(y, x, table, 0, pairs)
    assert got is y
    assert_close(got, want)


def test_wide_ranks_and_weights_per_rank_are_added_to_many_rows(variant: str) -> None:
    table = SlotTable([(64, 48)], 2)
    for slot, dtype in enumerate(DTYPES):
        table.put([slot], pack([(64, 48)], [[70]], seed=slot, dtype=dtype))
    pairs = runs([40, 41], [0, 1])
    pairs.rank_weight = torch.rand(81, 70)
    for dtype in DTYPES:
        x, y = torch.randn(81, 64).to(dtype), torch.randn(81, 48).to(dtype)
        want = y.double()
        for p in range(81):
            a, b, _, scale = table.rows_of(int(pairs.slot[p]), 0)
            t = (a.double() @ x[p].double()) * pairs.rank_weight[p]
            want[p] += scale * float(pairs.weight[p]) * (t @ b.double())
        assert_close(apply_many(y, x, table, 0, pairs), want)


def test_rows_of_nan_or_infinity_stay_alone_among_many(compiled: str) -> None:
    table, pairs = mixed_table([(64, 48)]), runs([40], [1])
    x = torch.randn(40, 64).bfloat16()
    clean = apply_many(torch.zeros(40, 48).bfloat16(), x, table, 0, pairs)
    x[3], x[17] = float("nan"), float("inf")
    got = apply_many(torch.zeros(40, 48).bfloat16(), x, table, 0, pairs)
    others = [n for n in range(40) if n not in (3, 17)]
    assert bool(got[3].isnan().all()) and not bool(got[17].isfinite().any())
    assert torch.equal(got[others], clean[others])


def test_two_threads_add_the_bits_of_one(compiled: str) -> None:
    table, pairs = mixed_table([(64, 144)]), runs([70, 33, 20], [1, 3, 0])
    x = torch.randn(123, 64).bfloat16()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(apply_many(torch.zeros(123, 144).bfloat16(), x, table, 0, pairs))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_cannot_be_added_is_refused(variant: str) -> None:
    table, pairs = mixed_table([(64, 48)], dora=True), runs([2], [3])
    x, y = torch.zeros(2, 64), torch.zeros(2, 48)
    with pytest.raises(ValueError, match="DoRA slot rescales .* use group_linear"):
        apply_many(y, x, table, 0, pairs)
    with pytest.raises(ValueError, match=r"x is .*\(2, 48\) and y .* want \(2, 64\) and \(2, 48\)"):
        apply_many(y, y, table, 0, pairs)
    table.clear([1])
    with pytest.raises(ValueError, match="holds no adapter"):
        apply_many(y, x, table, 0, runs([2], [1]))


# --- Many rows of a group -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [160, 177, 352])
@pytest.mark.parametrize("kind", ["runs", "mixed", "several"])
@pytest.mark.parametrize("d_outs", [(48, 16, 80), (400, 32, 16)])
def test_a_group_of_many_rows_equals_the_loop(
    compiled: str, num_rows: int, kind: str, d_outs: tuple[int, ...]
) -> None:
    group = many_rows(num_rows, kind, d_outs)
    check(group)


def many_rows(num_rows: int, kind: str, d_outs: tuple[int, ...] = (48, 16, 80)) -> Group:
    """runs: one slot per request; mixed: any slot anywhere; several: three slots per row. All slots are bf16."""
    group = random_group(num_rows, d_outs=d_outs, dtype=torch.bfloat16)
    group.table = SlotTable(group.table.widths, 7)
    for slot, rank in enumerate((8, 3, 16, 17, 40, 1)):
        group.table.put(
            [slot], pack(group.table.widths, [[rank, 0, rank]], seed=slot, dtype=torch.bfloat16)
        )
    if kind == "runs":
        lengths = [70, 33, 1, num_rows - 104]
        group.pairs = [runs(lengths, [0, 3, -1, 4])] * 3
    elif kind == "mixed":
        group.pairs = [random_pairs(num_rows, num_rows, num_rows, n) for n in range(3)]
    else:
        group.pairs = [random_pairs(num_rows, num_rows, 3 * num_rows, 7), None, None]
    return group


@pytest.mark.parametrize("role", ["exit", "late"])
def test_many_rows_leave_an_ffn_and_meet_late_gates(compiled: str, role: str) -> None:
    group = many_rows(200, "runs")
    pairs = group.pairs[0]
    assert pairs is not None
    if role == "exit":
        token = (torch.arange(200) * 170 // 200).int()
        group.exit = RowMap(token, torch.rand(200), 170)
        group.pairs = [replace(pairs, dst=token, num_dst=170, cache={}), None, None]
        check(group)
        return
    row = torch.arange(200, dtype=torch.int32).repeat_interleave(2)
    late = Pairs(row, row, torch.tensor([0, 2] * 200).int(), torch.zeros(400), 200, 200)
    group.pairs = [late, None, replace(late, cache={})]
    gate = late_gate([8, 16])
    call = LateCall([gate], row[::2], 0 * row[::2], 2 * row[::2])
    got = group_linear(group.x, group.members, group.table, group.pairs, gate=call)
    assert bool((late.weight.view(200, 2).sum(1) - 1).abs().max() < 1e-5)
    for y, want in zip(got, loop(group), strict=True):
        assert_close(y, want)


@pytest.mark.parametrize("kind", ["runs", "mixed", "several"])
def test_a_row_among_many_does_not_depend_on_where_it_lies(compiled: str, kind: str) -> None:
    group = many_rows(200, kind)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    place = torch.empty_like(order)
    place[order] = torch.arange(200)
    other = replace(group, x=group.x[order], pairs=[])
    for pairs in group.pairs:
        moved = None if pairs is None else place[pairs.src.long()].int()
        other.pairs.append(
            None if pairs is None else replace(pairs, src=moved, dst=moved, cache={})
        )
    for here, there in zip(run(group), run(other), strict=True):
        assert torch.equal(here[order], there)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_adapter_that_is_not_finite_reaches_no_row_but_its_own(
    compiled: str, bad: float
) -> None:
    group = many_rows(200, "mixed")
    want = run(group)
    pairs = group.pairs[0]
    assert pairs is not None
    group.table.rows_of(0, 0)[1][3, 7] = bad
    got = run(group)
    hit = torch.zeros(200, dtype=torch.bool)
    hit[pairs.dst[(pairs.slot == 0) & (pairs.weight != 0)].long()] = True
    assert torch.equal(got[0][~hit], want[0][~hit]) and not bool(got[0][hit][:, 7].isfinite().any())
    others = [column for column in range(48) if column != 7]
    assert_close(got[0][hit][:, others], want[0][hit][:, others].double())


def test_two_threads_give_many_rows_the_bits_of_one(compiled: str) -> None:
    group = many_rows(200, "runs", (400, 32, 16))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(run(group))
        finally:
            torch.set_num_threads(1)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


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


def test_gated_ranks_keep_their_low_bits_among_many_rows(compiled: str) -> None:
    group = many_rows(200, "runs")
    group.members = [
        replace(m, weight=torch.zeros_like(m.weight), bias=None) for m in group.members
    ]
    exact = loop(group)[0]
    got = run(group)[0]
    acts = exact.abs() > 1e-3
    assert float((got == exact.bfloat16())[acts].float().mean()) > 0.95
