"""The norm kernel is the definition, in every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loramux.ops import norm
from loramux.ops.compiler import runnable_variants
from loramux.ops.norm import RULES, Rule, bind_norm, rms_norm_torch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[variant.name for variant in runnable_variants()])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LORAMUX_CPU_VARIANT", request.param)
    norm.kernel.cache_clear()
    if norm.kernel().call is None:
        pytest.skip(norm.kernel().why_not)
    yield request.param
    norm.kernel.cache_clear()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def normed(x: Tensor, weight: Tensor, eps: float, rule: Rule) -> Tensor:
    run = bind_norm(weight, eps, rule)
    assert run is not None
    y = run(x)
    assert y is not None
    return y


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 63, 64, 576, 1000])
def test_the_kernel_equals_the_definition(
    variant: str, width: int, dtype: torch.dtype, rule: Rule
) -> None:
    x, weight = torch.randn(2, 9, width).to(dtype), torch.rand(width).to(dtype) + 0.5
    expected = rms_norm_torch(x, weight, 1e-5, rule)
    got = normed(x, weight, 1e-5, rule)
    assert got.shape == expected.shape and got.dtype is dtype
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    if dtype is torch.bfloat16:
        assert (got == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(variant: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(33, 100).to(dtype), torch.rand(100).to(dtype)
    x[5] = torch.nan
    together = normed(x, weight, 1e-6, "round_first")
    assert together[5].isnan().all()
    for row in (0, 4, 6, 32):
        assert torch.equal(normed(x[row : row + 1], weight, 1e-6, "round_first")[0], together[row])


def test_the_number_of_threads_does_not_change_a_bit(variant: str) -> None:
    x, weight = torch.randn(200, 512), torch.rand(512)
    one = normed(x, weight, 1e-6, "shifted")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = normed(x, weight, 1e-6, "shifted")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_rows_need_not_lie_next_to_each_other(variant: str) -> None:
    x, weight = torch.randn(4, 6, 32), torch.rand(32)
    turned = x.transpose(0, 1)
    got = normed(turned, weight, 1e-6, "round_last")
    assert torch.equal(got, normed(turned.contiguous(), weight, 1e-6, "round_last"))


def test_what_the_kernel_does_not_take_is_left_to_the_caller(variant: str) -> None:
    weight = torch.rand(32)
    run = bind_norm(weight, 1e-6, "round_first")
    assert run is not None
    assert run(torch.randn(3, 32).double()) is None
    assert run(torch.randn(3, 31)) is None
    with torch.enable_grad():
        assert run(torch.randn(3, 32)) is None
    assert bind_norm(weight.half(), 1e-6, "round_first") is None
    assert bind_norm(weight[::2], 1e-6, "round_first") is None


def test_a_weight_that_moved_is_noticed(variant: str) -> None:
    weight = torch.rand(32)
    run = bind_norm(weight, 1e-6, "round_first")
    assert run is not None
    weight.data = torch.rand(32)
    assert run(torch.randn(3, 32)) is None


def test_without_a_compiler_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_NO_CC", "1")
    norm.kernel.cache_clear()
    assert bind_norm(torch.rand(32), 1e-6, "round_first") is None
    norm.kernel.cache_clear()
