"""The kernel reads parameters in place: it sees what changes, and refuses what it cannot read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from loramux.ops import cpu
from loramux.ops.contract import Pairs, RowMap, Spans
from ops.cases import Case, assert_close, random_case

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


def site() -> tuple[Case, Tensor, cpu.SiteState]:
    case = random_case(3, num_src=2, route="one_slot", ranks=(4,), dtype=torch.float32)
    weight = torch.randn(case.b.shape[0 + 1], case.a.shape[1])
    return case, weight, cpu.SiteState()


def both(
    case: Case, weight: Tensor, bias: Tensor | None, state: cpu.SiteState
) -> tuple[Tensor, Tensor]:
    """Through the kept state, and from scratch in torch."""
    _, x, a, b, spans, pairs = case.args()
    with torch.no_grad():
        kept = cpu.linear(x, weight, bias, a, b, spans, pairs, state=state)
        want = cpu.linear_torch(x, weight, bias, a, b, spans, replace(pairs, cache={}))
    return kept, want


def test_a_change_in_place_is_seen_without_a_refill() -> None:
    case, weight, state = site()
    both(case, weight, None, state)
    for tensor in (weight, case.a, case.b):
        tensor.mul_(2).add_(1)
        assert not state.is_stale(weight, None, case.a, case.b, case.spans)
        assert_close(*both(case, weight, None, state))


def test_replaced_and_moved_tensors_are_noticed() -> None:
    case, weight, state = site()
    bias = torch.randn(weight.shape[0])
    both(case, weight, bias, state)
    changes = {
        "weight": lambda: torch.randn_like(weight),
        "bias": lambda: torch.randn_like(bias),
        "a": lambda: torch.randn_like(case.a),
        "b": lambda: torch.randn(case.b.shape).bfloat16(),
    }
    for name, make in changes.items():
        given = {"weight": weight, "bias": bias, "a": case.a, "b": case.b, name: make()}
        changed = replace(case, a=given["a"], b=given["b"])
        assert state.is_stale(given["weight"], given["bias"], given["a"], given["b"], case.spans), (
            name
        )
        assert_close(*both(changed, given["weight"], given["bias"], state))
        both(case, weight, bias, state)


def test_a_parameter_whose_data_moved_is_noticed() -> None:
    case, weight, state = site()
    parameter = nn.Parameter(weight, requires_grad=False)
    both(case, parameter, None, state)
    parameter.data = torch.randn_like(weight)
    assert_close(*both(case, parameter, None, state))


def test_another_gate_tensor_on_the_same_pairs_is_noticed() -> None:
    case, weight, state = site()
    _, x, a, b, spans, pairs = case.args()
    cpu.linear(x, weight, None, a, b, spans, pairs, state=state)
    pairs.weight = torch.zeros_like(pairs.weight)
    got = cpu.linear(x, weight, None, a, b, spans, pairs, state=state)
    assert_close(got, functional.linear(x, weight).double())


def test_what_the_kernel_cannot_read_is_refused_with_what_was_given() -> None:
    case, weight, _ = site()
    with pytest.raises(ValueError, match=r"weight is torch.float16 .*contiguous.*torch.float32"):
        cpu.prepare(weight.half())
    with pytest.raises(ValueError, match="weight is .* contiguous"):
        cpu.prepare(weight.T)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(3,\) on cpu; its shape must be"):
        cpu.prepare(weight, torch.zeros(3))
    with pytest.raises(ValueError, match="a is .*its shape must be"):
        cpu.prepare(weight, None, case.a[:, 1:].contiguous(), case.b, case.spans)
    with pytest.raises(ValueError, match="give all three"):
        cpu.prepare(weight, None, case.a)
    with pytest.raises(ValueError, match="spans reach rank row 9, but a and b have 4"):
        cpu.prepare(weight, None, case.a, case.b, Spans.packed([9], [1.0]))
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 .*, the weight torch.float32"):
        cpu.linear(case.x.bfloat16(), weight)


def wrong(**change: object) -> Pairs:
    index = torch.zeros(2, dtype=torch.int32)
    return replace(Pairs(index, index, index, torch.ones(2), 2, 2), **change)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (wrong(src=torch.tensor([0, 2], dtype=torch.int32)), "source row lies outside"),
        (wrong(src=torch.tensor([-1, 0], dtype=torch.int32)), "source row lies outside"),
        (wrong(dst=torch.tensor([0, 9], dtype=torch.int32)), "destination row lies outside"),
        (wrong(slot=torch.tensor([0, 1], dtype=torch.int32)), "slot is not in spans"),
        (wrong(rank_weight=torch.ones(2, 3)), "fewer columns than a slot has ranks"),
        (wrong(num_src=3), "another number of rows"),
        (wrong(num_dst=1), "another number of rows"),
        (wrong(weight=torch.ones(3)), "must have one length"),
    ],
)
def test_pairs_that_point_outside_are_an_error_not_a_crash(pairs: Pairs, message: str) -> None:
    case, weight, _ = site()
    with pytest.raises(ValueError, match=message):
        cpu.linear(case.x, weight, None, case.a, case.b, case.spans, pairs)


def test_row_maps_that_point_outside_are_an_error() -> None:
    case, weight, _ = site()
    outside = RowMap(torch.tensor([0, 5], dtype=torch.int32), torch.ones(2), 2)
    with pytest.raises(ValueError, match="token of the row map lies outside"):
        cpu.linear(case.x, weight, enter=outside)
    with pytest.raises(ValueError, match="token of the row map lies outside"):
        cpu.linear(case.x, weight, exit=outside)


def test_gradients_are_refused_not_lost() -> None:
    case, weight, _ = site()
    case.a.requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        cpu.linear(case.x, weight, None, case.a, case.b, case.spans, case.pairs)
    with pytest.raises(ValueError, match="no gradient"):
        cpu.apply(*case.args())
    with torch.no_grad():
        cpu.linear(case.x, weight, None, case.a, case.b, case.spans, case.pairs)
