"""`reference` and `grouped` are the contract, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from loramux.ops import grouped, reference
from loramux.ops.contract import Pairs, Spans
from ops.cases import CASES, Case, assert_close, exact, loop, random_case

BACKENDS = {
    "reference": reference.apply,
    "grouped loop": partial(grouped.apply, one_product=False),
    "grouped product": partial(grouped.apply, one_product=True),
}
# torch's grouped product takes no float64, and rows that start on 16 bytes.
LOOSE = ["reference", "grouped loop"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", LOOSE)
@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_any_route_equals_the_loop_over_pairs_in_float64(name: str, case: Case) -> None:
    # Weights are fp32 by contract; the backend must not round them further in float64.
    assert_close(BACKENDS[name](*case.args()), exact(case))


@pytest.mark.parametrize("name", LOOSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ab", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["any", "plain", "one_slot", "top2"])
def test_low_precision_stays_within_rounding(
    name: str, dtype: torch.dtype, ab: torch.dtype, route: str
) -> None:
    case = random_case(3, route=route, rank_weight=True).to(dtype, ab)
    got = BACKENDS[name](*case.args())
    assert got.dtype is dtype
    assert_close(got, exact(case))


@pytest.mark.skipif(not grouped.HAS_GROUPED_MM, reason="this torch has no grouped product")
@pytest.mark.parametrize("rank_weight", [False, True])
@pytest.mark.parametrize("ranks", [(3, 0, 17, 8), (8, 8, 8, 8), (1,)])
def test_the_grouped_product_equals_the_loop(ranks: tuple[int, ...], rank_weight: bool) -> None:
    case = random_case(5, ranks=ranks, rank_weight=rank_weight, dtype=torch.bfloat16)
    assert_close(BACKENDS["grouped product"](*case.args()), exact(case))


def gradients(apply: Callable[..., Tensor], case: Case) -> list[Tensor]:
    pairs = replace(case.pairs, weight=case.pairs.weight.double(), cache={})
    if pairs.rank_weight is not None:
        pairs.rank_weight = pairs.rank_weight.double()
    leaves = [
        case.x,
        case.a,
        case.b,
        pairs.weight,
        *([] if pairs.rank_weight is None else [pairs.rank_weight]),
    ]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, a, b, pairs.weight = leaves[:4]
    if pairs.rank_weight is not None:
        pairs.rank_weight = leaves[4]
    out = apply(case.y.clone(), x, a, b, case.spans, pairs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum() + out.square().sum(), leaves))


@pytest.mark.parametrize("name", LOOSE)
@pytest.mark.parametrize("rank_weight", [False, True])
@pytest.mark.parametrize("route", ["any", "plain", "one_slot", "top2"])
def test_gradients_equal_those_of_the_loop(name: str, route: str, rank_weight: bool) -> None:
    case = random_case(11, route=route, rank_weight=rank_weight, ranks=(3, 2, 5, 4))
    for got, want in zip(gradients(BACKENDS[name], case), gradients(loop, case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not grouped.HAS_GROUPED_MM, reason="this torch has no grouped product")
def test_the_grouped_product_has_the_gradients_of_the_reference() -> None:
    case = random_case(2, ranks=(3, 2, 5, 4), dtype=torch.bfloat16)
    found = []
    for apply in (reference.apply, BACKENDS["grouped product"]):
        leaves = [t.clone().requires_grad_() for t in (case.x, case.a, case.b)]
        apply(case.y.clone(), *leaves, case.spans, replace(case.pairs, cache={})).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for got, want in zip(*found, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", LOOSE)
def test_nothing_but_padding_leaves_y_bit_identical(name: str) -> None:
    case = random_case(1, dtype=torch.float32)
    case.pairs.slot.fill_(-1)
    assert torch.equal(BACKENDS[name](*case.args()), case.y)


@pytest.mark.parametrize("name", LOOSE)
def test_unowned_rank_rows_are_never_read(name: str) -> None:
    spans = Spans((4, 0), (2, 3), (2.0, 2.0))  # rows 3, 6 and 7 are nobody's
    case = random_case(4, ranks=(8,), num_pairs=9)
    case.spans = spans
    case.pairs.slot = torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    want = exact(case)
    case.a[[3, 6, 7]] = 1.0
    case.b[[3, 6, 7]] = 1e30
    assert_close(BACKENDS[name](*case.args()), want)


@pytest.mark.parametrize("name", LOOSE)
def test_equal_indices_of_unequal_sides_are_not_one_side(name: str) -> None:
    case = random_case(4, num_src=3, num_dst=2, num_pairs=2)
    case.pairs.src = case.pairs.dst = torch.tensor([1, 0], dtype=torch.int32)
    assert_close(BACKENDS[name](*case.args()), exact(case))


def test_a_mask_made_without_gradients_is_not_reused_where_they_are_wanted() -> None:
    case = random_case(6)
    case.pairs.weight = case.pairs.weight.double().requires_grad_()
    pairs = case.pairs
    with torch.no_grad():
        reference.apply(case.y.clone(), case.x, case.a, case.b, case.spans, pairs)
    out = reference.apply(case.y.clone(), case.x, case.a, case.b, case.spans, pairs)
    assert out.requires_grad


def test_sites_under_one_route_share_the_mask() -> None:
    case = random_case(7)
    same = Spans(case.spans.start, case.spans.rank, case.spans.scale)
    first = reference.plan_for(case.spans, case.pairs, torch.float32)
    assert reference.plan_for(same, case.pairs, torch.float32) is first
    assert reference.plan_for(same, case.pairs, torch.bfloat16) is not first


def test_a_mask_made_in_inference_mode_does_not_reach_training() -> None:
    case = random_case(6, dtype=torch.float32)
    route = (case.spans, case.pairs)
    with torch.inference_mode():
        reference.apply(case.y.clone(), case.x, case.a, case.b, *route)
    a = case.a.clone().requires_grad_()
    reference.apply(case.y.clone(), case.x, a, case.b, *route).sum().backward()
    assert a.grad is not None and bool(a.grad.abs().sum() > 0)


@pytest.mark.parametrize("name", LOOSE)
def test_autocast_keeps_the_dtype_of_y(name: str) -> None:
    case = random_case(12, dtype=torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in (case.x, case.a, case.b)]
    pairs = replace(case.pairs, cache={})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.nn.functional.linear(
            torch.zeros(case.y.shape[0], 3), torch.zeros(case.y.shape[1], 3)
        )
        out = BACKENDS[name](y, *leaves, case.spans, pairs)
    assert out.dtype is torch.bfloat16
    assert_close(out, exact(replace(case, y=torch.zeros_like(case.y))))
    out.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype is torch.float32 for leaf in leaves)


def test_a_fresh_y_is_written_in_place_and_a_leaf_is_not() -> None:
    case = random_case(8, dtype=torch.float32)
    y = case.y.clone()
    assert reference.apply(y, *case.args()[1:]) is y
    leaf = case.y.clone().requires_grad_()
    out = reference.apply(leaf, *case.args()[1:])
    out.sum().backward()
    assert torch.equal(leaf.detach(), case.y) and torch.equal(leaf.grad, torch.ones_like(leaf))


def test_backward_keeps_nothing_wider_than_the_ranks_besides_x() -> None:
    """The reason why training through `reference` costs little memory."""
    tokens, d_in, d_out, rank = 64, 256, 512, 4
    spans = Spans.packed([rank] * 3, [2.0] * 3)
    src = torch.arange(tokens, dtype=torch.int32).repeat_interleave(2)
    pairs = Pairs(
        src, src, (torch.arange(2 * tokens) % 3).int(), torch.rand(2 * tokens), tokens, tokens
    )
    x = torch.randn(tokens, d_in, dtype=torch.bfloat16, requires_grad=True)
    a, b = (torch.randn(3 * rank, width, requires_grad=True) for width in (d_in, d_out))
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = torch.zeros(tokens, d_out, dtype=torch.bfloat16)
        reference.apply(y, x, a, b, spans, pairs)
    saved.pop(x.untyped_storage().data_ptr())
    parameters = 2 * 3 * rank * (d_in + d_out)  # their bf16 copies
    assert sum(saved.values()) <= parameters + 4 * (2 * tokens * 3 * rank)
