"""The rotary kernel gives the bits of the definition, in every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loramux.ops import rotary
from loramux.ops.compiler import runnable_variants


@pytest.fixture(params=[variant.name for variant in runnable_variants()])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LORAMUX_CPU_VARIANT", request.param)
    rotary.kernel.cache_clear()
    if rotary.kernel().call is None:
        pytest.skip(rotary.kernel().why_not)
    yield request.param
    rotary.kernel.cache_clear()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(
    dtype: torch.dtype, num: int, dim: int, turned: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(1, num, 4, dim).to(dtype).transpose(1, 2)
    k = torch.randn(1, num, 2, dim).to(dtype).transpose(1, 2)
    return q, k, torch.randn(1, num, turned).to(dtype), torch.randn(1, num, turned).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "turned"), [(8, 8), (64, 64), (80, 80), (80, 20), (64, 2)])
@pytest.mark.parametrize("num", [1, 5, 300])
def test_the_kernel_gives_the_bits_of_the_definition(
    variant: str, dtype: torch.dtype, num: int, dim: int, turned: int
) -> None:
    given = draw(dtype, num, dim, turned)
    got = rotary.rotary(*given)
    assert got is not None
    for ours, theirs in zip(got, rotary.rotary_torch(*given), strict=True):
        assert torch.equal(ours, theirs)


def test_heads_may_lie_in_memory_in_any_way(variant: str) -> None:
    q, k, cos, sin = draw(torch.float32, 6, 16, 16)
    together = torch.cat([q, k], 1).transpose(1, 2).contiguous().transpose(1, 2)
    expected = rotary.rotary_torch(q, k, cos, sin)
    for query, key in ((q.contiguous(), k), (together[:, :4], together[:, 4:])):
        got = rotary.rotary(query, key, cos, sin)
        assert got is not None
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_what_the_kernel_does_not_take_is_left_to_the_caller(variant: str) -> None:
    q, k, cos, sin = draw(torch.float32, 6, 16, 16)
    assert rotary.rotary(q.double(), k.double(), cos.double(), sin.double()) is None
    assert rotary.rotary(q, k, cos.bfloat16(), sin) is None
    assert rotary.rotary(q.expand(2, -1, -1, -1), k, cos, sin) is None
    assert rotary.rotary(q, k[:, :, :3], cos, sin) is None
    assert rotary.rotary(q, k, cos[:, :3], sin[:, :3]) is None
    with torch.enable_grad():
        assert rotary.rotary(q, k, cos, sin) is None


def test_the_number_of_threads_does_not_change_a_bit(variant: str) -> None:
    given = draw(torch.bfloat16, 300, 64, 64)
    one = rotary.rotary(*given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = rotary.rotary(*given)
    finally:
        torch.set_num_threads(before)
    assert one is not None and two is not None
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
