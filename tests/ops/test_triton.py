"""The Triton kernels are the contract, run by Triton's interpreter in a process of its own.

Why apart: Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import pytest
import torch

from ops.cases import assert_close, exact, random_case
from ops.child import run_child

pytest.importorskip("triton")
SCRIPT = """
import torch
from loramux.ops import triton
from ops.cases import assert_close, exact, random_case

for number, route in enumerate(["any", "plain", "one_slot", "top2"]):
    for dtype in (torch.float32, torch.bfloat16):
        for rank_weight in (False, True):
            case = random_case(number, route=route, rank_weight=rank_weight, widths=(70, 37)).to(dtype, torch.float32)
            assert_close(triton.apply(*case.args()), exact(case))
empty = random_case(0, dtype=torch.float32)
empty.pairs.slot.fill_(-1)
assert torch.equal(triton.apply(*empty.args()), empty.y)
print("equal")
"""


def test_any_route_equals_the_loop_in_the_interpreter() -> None:
    assert run_child(SCRIPT) == "equal"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_route_equals_the_loop_on_a_gpu(dtype: torch.dtype) -> None:
    from loramux.ops import triton

    case = random_case(1, rank_weight=True, widths=(576, 192)).to(dtype)
    y, x, a, b, spans, pairs = case.args()
    for name in ("src", "dst", "slot", "weight", "rank_weight"):
        setattr(pairs, name, getattr(pairs, name).cuda())
    got = triton.apply(y.cuda(), x.cuda(), a.cuda(), b.cuda(), spans, pairs)
    assert_close(got.cpu(), exact(case))
