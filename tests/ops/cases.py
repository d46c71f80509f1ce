"""What the backends are tested on: random spans and pairs, and the contract restated as a loop over single pairs.

Letters: S source rows, D destination rows, P pairs, R rank rows, I input width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from loramux.ops.contract import Pairs, Spans


@dataclass
class Case:
    y: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    spans: Spans
    pairs: Pairs

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Spans, Pairs]:
        """Ready for one call: y may be written, and the route remembers nothing."""
        return self.y.clone(), self.x, self.a, self.b, self.spans, replace(self.pairs, cache={})

    def to(self, dtype: torch.dtype, ab: torch.dtype | None = None) -> Case:
        return replace(
            self,
            y=self.y.to(dtype),
            x=self.x.to(dtype),
            a=self.a.to(ab or dtype),
            b=self.b.to(ab or dtype),
        )


def loop(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans, pairs: Pairs) -> Tensor:
    """The contract, one pair after the other, in the dtype of what it is given; differentiable."""
    rows = list(y.unbind(0))
    for p in range(pairs.num_pairs):
        slot = int(pairs.slot[p])
        if slot < 0:
            continue
        start, rank = spans.start[slot], spans.rank[slot]
        t = a[start : start + rank] @ x[int(pairs.src[p])]
        if pairs.rank_weight is not None:
            t = t * pairs.rank_weight[p, :rank]
        change = spans.scale[slot] * pairs.weight[p] * (t @ b[start : start + rank])
        rows[int(pairs.dst[p])] = rows[int(pairs.dst[p])] + change
    return torch.stack(rows) if rows else y


def exact(case: Case) -> Tensor:
    """The loop in float64 on the very numbers that the backend gets."""
    wide = case.to(torch.float64)
    pairs = wide.pairs
    gates = None if pairs.rank_weight is None else pairs.rank_weight.double()
    pairs = replace(pairs, weight=pairs.weight.double(), rank_weight=gates, cache={})
    return loop(wide.y, wide.x, wide.a, wide.b, wide.spans, pairs)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Within rounding of got's dtype, measured against the largest entry."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[got.dtype]
    limit = tolerance * max(1.0, float(want.abs().max()))
    assert float((got.detach().double() - want.double()).abs().max()) <= limit


def random_case(
    seed: int = 0,
    *,
    ranks: tuple[int, ...] = (3, 0, 17, 8),
    num_src: int = 5,
    num_dst: int = 7,
    num_pairs: int = 15,
    widths: tuple[int, int] = (64, 48),
    rank_weight: bool = False,
    route: str = "any",
    dtype: torch.dtype = torch.float64,
) -> Case:
    """route: any | plain (one pair per row, in order) | one_slot (the same, one slot) | top2 (two slots per row)."""
    rng = torch.Generator().manual_seed(seed)
    spans = Spans.packed(ranks, [2.0, 1.0, 0.3, 16 / 8**0.5][: len(ranks)])
    slots = len(ranks)
    if route != "any":
        num_dst = num_src
        num_pairs = 2 * num_src if route == "top2" else num_src

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (num_pairs,), generator=rng, dtype=torch.int32)

    if route == "any":
        src, dst = integers(0, num_src), integers(0, num_dst)
    else:
        src = torch.arange(num_src, dtype=torch.int32).repeat_interleave(num_pairs // num_src)
        dst = src.clone()
    one = int(integers(0, slots)[0]) if route == "one_slot" else None
    pairs = Pairs(
        src,
        dst,
        torch.full_like(src, one) if one is not None else integers(-1, slots),
        torch.rand(num_pairs, generator=rng),
        num_src,
        num_dst,
        torch.rand(num_pairs, max(ranks) + 1, generator=rng) if rank_weight else None,
        identity=route in ("plain", "one_slot"),
        one_slot=one,
    )
    d_in, d_out = widths

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=rng, dtype=torch.float64)

    case = Case(
        normal(num_dst, d_out), normal(num_src, d_in), normal(sum(ranks), d_in) / d_in**0.5,
        normal(sum(ranks), d_out), spans, pairs,
    )  # fmt: skip
    return case.to(dtype)


CASES = st.builds(
    random_case,
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(0, 17), min_size=1, max_size=4).map(tuple),
    num_src=st.integers(1, 6),
    num_dst=st.integers(1, 6),
    num_pairs=st.integers(1, 14),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 50)),
    rank_weight=st.booleans(),
    route=st.sampled_from(["any", "plain", "one_slot", "top2"]),
)
