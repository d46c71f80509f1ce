"""The linear with one LoRA per segment is each segment's own linear and LoRA, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops.segments import Segment, linear

WIDTH_IN, WIDTH_OUT = 12, 9

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of a job without rows


def made(sizes: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = [
        (draw(rank, WIDTH_IN).requires_grad_(), draw(rank, WIDTH_OUT).requires_grad_())
        if rank
        else (None, None)
        for rank in ranks
    ]
    segments = [
        Segment(size, a, b, 0.5 + i)
        for i, (size, (a, b)) in enumerate(zip(sizes, rows, strict=True))
    ]
    return {
        "x": draw(sum(sizes), WIDTH_IN).requires_grad_(),
        "weight": draw(WIDTH_OUT, WIDTH_IN),
        "bias": draw(WIDTH_OUT),
        "segments": segments,
        "grad": draw(sum(sizes), WIDTH_OUT),
    }


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, segments: list[Segment]) -> Tensor:
    out, first = [], 0
    for s in segments:
        own = x[first : first + s.num_rows]
        first += s.num_rows
        y = functional.linear(own, weight, bias)
        out.append(y if s.a is None or s.b is None else y + s.scale * (own @ s.a.T) @ s.b)
    return torch.cat(out)


CASES = {
    "one job": ((5,), (3,)),
    "two jobs": ((4, 7), (2, 2)),
    "five jobs of unlike rank": ((1, 6, 3, 2, 9), (1, 4, 2, 8, 3)),
    "one without an adapter": ((3, 4, 2), (2, 0, 5)),
    "a job without rows": ((3, 0, 2), (2, 2, 2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_autograd_to_1e_9(case: str, with_bias: bool) -> None:
    given = made(*CASES[case], torch.float64)
    inputs = [given["x"], *(t for s in given["segments"] for t in (s.a, s.b) if t is not None)]
    bias = given["bias"] if with_bias else None
    results = []
    for function in (linear, reference):
        y = function(given["x"], given["weight"], bias, given["segments"])
        results.append([y, *torch.autograd.grad(y, inputs, given["grad"], **UNUSED)])
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-9)


def test_a_segment_of_nan_stays_in_its_segment() -> None:
    given = made((4, 3), (2, 2), torch.float32)
    given["x"].data[:4] = float("nan")
    y = linear(given["x"], given["weight"], None, given["segments"])
    assert y[:4].isnan().all()
    second = given["segments"][1]
    grads = torch.autograd.grad(y, [second.a, second.b], given["grad"])
    assert all(torch.isfinite(grad).all() for grad in (y[4:], *grads))


def test_a_half_precision_base_gives_wide_gradients_of_wide_rows() -> None:
    given = made((4, 3), (2, 2), torch.float32)
    x, weight = given["x"].detach().bfloat16(), given["weight"].bfloat16()
    y = linear(x, weight, None, given["segments"])
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(
        y, [t for s in given["segments"] for t in (s.a, s.b)], given["grad"].bfloat16()
    )
    assert {grad.dtype for grad in grads} == {torch.float32}
    wide = reference(given["x"].detach(), given["weight"], None, given["segments"])
    torch.testing.assert_close(y.float(), wide, rtol=0.05, atol=0.2)


def test_segments_that_do_not_make_up_the_rows_are_refused() -> None:
    given = made((4, 3), (2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"\[4\] rows do not make up 7"):
        linear(given["x"], given["weight"], None, given["segments"][:1])
