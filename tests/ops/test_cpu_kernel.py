"""The C kernel is the contract, in every instruction set this CPU has, and so is the path without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn import functional

from loramux.ops import cpu, rows
from loramux.ops.compiler import BuildError, runnable_variants
from loramux.ops.contract import Pairs, RowMap, Spans
from ops.cases import CASES, Case, assert_close, exact, loop, random_case
from ops.variants import DTYPES, VARIANTS, forced


@pytest.fixture(params=[*VARIANTS, "torch"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel compiled for one instruction set, or none."""
    yield from forced(request.param, monkeypatch, cpu.kernel)


@pytest.fixture(params=VARIANTS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from forced(request.param, monkeypatch, cpu.kernel)


def linear_exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    case: Case,
    enter: RowMap | None,
    leave: RowMap | None,
) -> Tensor:
    """Base and LoRA in float64, rows handled by index."""
    x, weight = x.double(), weight.double()
    base_in = x
    if leave is not None:
        base_in = torch.zeros(leave.num_tokens, x.shape[1], dtype=torch.float64)
        base_in.index_add_(0, leave.token, x * leave.weight.double()[:, None])
    y = functional.linear(base_in, weight, None if bias is None else bias.double())
    if enter is not None:
        y = y[enter.token.long()]
    return exact(replace(case, y=y, x=x))


def with_base(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    d_in, d_out = case.x.shape[1], case.b.shape[1]
    weight = torch.randn(d_out, d_in, generator=rng) / d_in**0.5
    return weight.to(dtype), torch.randn(d_out, generator=rng).to(dtype)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=CASES)
def test_adding_any_route_equals_the_loop(variant: str, case: Case) -> None:
    case = case.to(torch.float32)
    assert_close(cpu.apply(*case.args()), exact(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_type", DTYPES, ids=str)
@pytest.mark.parametrize("b_type", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(64, 48), (50, 37), (96, 16)])
def test_base_and_lora_in_one_call_equal_the_loop(
    variant: str,
    dtype: torch.dtype,
    a_type: torch.dtype,
    b_type: torch.dtype,
    widths: tuple[int, int],
) -> None:
    case = random_case(9, num_dst=5, num_pairs=12, widths=widths, rank_weight=True).to(dtype)
    case.a, case.b = case.a.to(a_type), case.b.to(b_type)
    weight, bias = with_base(case, dtype)
    _, x, a, b, spans, pairs = case.args()
    got = cpu.linear(x, weight, bias, a, b, spans, pairs)
    assert got.dtype is dtype
    assert_close(got, linear_exact(x, weight, bias, case, None, None))
    assert_close(cpu.apply(*case.args()), exact(case))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_rows_works(variant: str, num_rows: int, dtype: torch.dtype) -> None:
    case = random_case(2, num_src=num_rows, route="top2").to(dtype)
    weight, _ = with_base(case, dtype)
    _, x, a, b, spans, pairs = case.args()
    got = cpu.linear(x, weight, None, a, b, spans, pairs)
    assert_close(got, linear_exact(x, weight, None, case, None, None))


def routed(token: list[int], role: str, dtype: torch.dtype) -> tuple[Case, RowMap]:
    """Every FFN row belongs to `token` and uses one expert; rows of one token are not all the same expert."""
    rng = torch.Generator().manual_seed(4)
    num_rows, num_tokens = len(token), max(token) + 1
    token_M = torch.tensor(token, dtype=torch.int32)
    row_M = torch.arange(num_rows, dtype=torch.int32)
    weight_M = torch.rand(num_rows, generator=rng)
    num_src, num_dst = (num_tokens, num_rows) if role == "enter" else (num_rows, num_tokens)
    case = random_case(5, num_src=num_src, num_dst=num_dst).to(dtype)
    case.pairs = Pairs(
        src=token_M if role == "enter" else row_M,
        dst=row_M if role == "enter" else token_M,
        slot=(row_M % 4).int(),
        weight=torch.ones(num_rows) if role == "enter" else weight_M,
        num_src=num_src,
        num_dst=num_dst,
    )
    return case, RowMap(token_M, weight_M, num_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ["enter", "exit"])
@pytest.mark.parametrize("token", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2], [2, 0, 1, 0], [0]])
def test_rows_enter_and_leave(
    variant: str, token: list[int], role: str, dtype: torch.dtype
) -> None:
    case, row_map = routed(token, role, dtype)
    weight, bias = with_base(case, dtype)
    _, x, a, b, spans, pairs = case.args()
    enter, leave = (row_map, None) if role == "enter" else (None, row_map)
    got = cpu.linear(x, weight, bias, a, b, spans, pairs, enter=enter, exit=leave)
    assert_close(got, linear_exact(x, weight, bias, case, enter, leave))
    base = cpu.linear(x, weight, bias, enter=enter, exit=leave)
    want = functional.linear(rows.fold_rows(x, row_map) if leave else x, weight, bias)
    assert_close(base, (rows.to_rows(want, row_map) if enter else want).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(64, 48), (50, 37)])
def test_a_request_alone_equals_itself_in_a_batch_bit_for_bit(
    compiled: str, dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    case = random_case(6, num_src=21, route="top2", widths=widths).to(dtype, torch.float32)
    weight, bias = with_base(case, dtype)
    _, x, a, b, spans, pairs = case.args()
    together = cpu.linear(x, weight, bias, a, b, spans, pairs)
    added = cpu.apply(case.y.clone(), x, a, b, spans, pairs)
    for n in range(21):
        own = torch.zeros(2, dtype=torch.int32)
        mine = slice(2 * n, 2 * n + 2)
        alone = Pairs(own, own, pairs.slot[mine], pairs.weight[mine], 1, 1)
        row = slice(n, n + 1)
        assert torch.equal(cpu.linear(x[row], weight, bias, a, b, spans, alone), together[row])
        assert torch.equal(cpu.apply(case.y[row].clone(), x[row], a, b, spans, alone), added[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(compiled: str, dtype: torch.dtype) -> None:
    case, row_map = routed([0, 0, 0, 1, 2], "exit", dtype)
    weight, bias = with_base(case, dtype)
    _, x, a, b, spans, pairs = case.args()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(cpu.linear(x, weight, bias, a, b, spans, pairs, exit=row_map))
            found.append(cpu.apply(case.y.clone(), x, a, b, spans, pairs))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[2]) and torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[3]) and torch.equal(found[1], found[5])


def test_padding_looks_up_no_slot(compiled: str) -> None:
    case = random_case(1, num_pairs=9, dtype=torch.float32)
    case.pairs.slot[::2] = -1
    want = exact(case)
    # What lies before the tables looks like a slot: padding must not be taken for it.
    tables = [torch.cat([column[3:], column]) for column in case.spans.table]
    case.spans.__dict__["table"] = tuple(table[1:] for table in tables)
    assert_close(cpu.apply(*case.args()), want)


def test_a_nan_with_every_bit_set_stays_a_nan(compiled: str) -> None:
    nan = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    one = torch.ones(1, 1)
    index = torch.zeros(1, dtype=torch.int32)
    pairs = Pairs(index, index, index, torch.ones(1), 1, 1)
    y, x = torch.zeros(1, 1).bfloat16(), one.bfloat16()
    assert bool(cpu.apply(y, x, one, nan, Spans.packed([1], [1.0]), pairs).isnan())


def test_rounding_is_to_nearest_even_and_keeps_nan_and_infinity(compiled: str) -> None:
    values = torch.tensor(
        [
            1 + 2**-8,
            1 + 3 * 2**-8,
            -1 - 2**-8,
            3.39e38,
            -3.4028e38,
            1e-20,
            float("nan"),
            float("inf"),
        ]
    )
    x = torch.ones(8, 1).bfloat16()
    pairs = Pairs(
        torch.arange(8, dtype=torch.int32), torch.arange(8, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32), values, 8, 8, identity=True, one_slot=0,
    )  # fmt: skip
    got = cpu.apply(
        torch.zeros(8, 1).bfloat16(),
        x,
        torch.ones(1, 1),
        torch.ones(1, 1),
        Spans.packed([1], [1.0]),
        pairs,
    )
    torch.testing.assert_close(got.flatten(), values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_leading_dimensions_and_strides_of_x_do_not_matter(variant: str) -> None:
    x = torch.randn(2, 3, 80)[..., :64]
    weight = torch.randn(48, 64)
    got = cpu.linear(x, weight)
    assert got.shape == (2, 3, 48)
    assert_close(got, functional.linear(x.double(), weight.double()))


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_NO_CC", "1")
    cpu.kernel.cache_clear()
    assert not cpu.available() and "LORAMUX_NO_CC" in cpu.why_not()
    monkeypatch.delenv("LORAMUX_NO_CC")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    cpu.kernel.cache_clear()
    assert "no C compiler" in cpu.why_not()
    cpu.kernel.cache_clear()


def test_an_instruction_set_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(BuildError, match="cannot run variant 'sse9'; it runs .*portable"):
        runnable_variants("sse9")


def test_the_loop_itself_is_dense_lora() -> None:
    case = random_case(1, route="one_slot", ranks=(4,))
    gate = case.spans.scale[0] * case.pairs.weight.double()[:, None]
    want = case.y + gate * (case.x @ case.a.T @ case.b)
    torch.testing.assert_close(loop(case.y, case.x, case.a, case.b, case.spans, case.pairs), want)
