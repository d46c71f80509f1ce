"""The gate kernel is the definition but for the last bit, in every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loramux.ops import gated as ops
from loramux.ops.compiler import runnable_variants
from loramux.ops.gated import ACTIVATIONS, Activation, gated, gated_torch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[variant.name for variant in runnable_variants()])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LORAMUX_CPU_VARIANT", request.param)
    ops.kernel.cache_clear()
    if ops.kernel().call is None:
        pytest.skip(ops.kernel().why_not)
    yield request.param
    ops.kernel.cache_clear()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def of_gate(gate: Tensor, activation: Activation) -> Tensor:
    y = gated(gate, torch.ones_like(gate), activation)
    assert y is not None
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 48), (1, 7, 1536)])
def test_the_kernel_equals_the_formula(
    variant: str, shape: tuple[int, ...], dtype: torch.dtype, activation: Activation
) -> None:
    gate, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    got = gated(gate, up, activation)
    assert got is not None and got.shape == gate.shape and got.dtype is dtype
    exact = gated_torch(gate.double(), up.double(), activation)
    # Twice rounded; where a GELU is nearly zero torch itself is no closer than this.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=1.5 * eps + 1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_torchs_but_for_a_few_last_bits(variant: str, dtype: torch.dtype) -> None:
    gate, up = (4 * torch.randn(64, 512)).to(dtype), torch.randn(64, 512).to(dtype)
    got = gated(gate, up, "silu")
    assert got is not None
    assert (got == gated_torch(gate, up, "silu")).float().mean() > 0.98


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_do_not_overflow_and_nan_stays(
    variant: str, dtype: torch.dtype, activation: Activation
) -> None:
    gate = torch.tensor([-1e4, -300.0, -90.0, -0.0, 0.0, 90.0, 300.0, 1e4, torch.nan] * 3).to(dtype)
    got = of_gate(gate, activation)
    expected = gate.double().clamp_min(0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-20, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_has_the_same_bits_wherever_it_lies(variant: str, dtype: torch.dtype) -> None:
    gate = torch.randn(100).to(dtype)
    together = of_gate(gate, "silu")
    for i in range(0, 100, 7):
        assert torch.equal(of_gate(gate[i:].clone(), "silu"), together[i:])


def test_the_number_of_threads_does_not_change_a_bit(variant: str) -> None:
    gate = torch.randn(70_001)
    one = of_gate(gate, "silu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = of_gate(gate, "silu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_what_the_kernel_does_not_take_is_left_to_the_caller(variant: str) -> None:
    x = torch.randn(4, 6)
    assert gated(x.double(), x.double(), "silu") is None
    assert gated(x, x.bfloat16(), "silu") is None
    assert gated(x, x[:2], "silu") is None
    assert gated(x.t(), x.t(), "silu") is None
    with torch.enable_grad():
        assert gated(x, x, "silu") is None
