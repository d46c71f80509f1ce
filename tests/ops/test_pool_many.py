"""Many rows: added to what a base gave, or base and adapters in one call; a row depends on no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loramux.ops.contract import Pairs, RowMap
from loramux.ops.gates import LateCall
from loramux.ops.pool import Member, SlotTable, apply_many, group_linear
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
from ops.variants import DTYPES, check, compiled, run, variant

__all__ = ["compiled", "variant"]


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


def test_gated_ranks_keep_their_low_bits_among_many_rows(compiled: str) -> None:
    group = many_rows(200, "runs")
    group.members = [
        replace(m, weight=torch.zeros_like(m.weight), bias=None) for m in group.members
    ]
    exact = loop(group)[0]
    got = run(group)[0]
    acts = exact.abs() > 1e-3
    assert float((got == exact.bfloat16())[acts].float().mean()) > 0.95
