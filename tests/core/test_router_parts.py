"""The parts routers are made of: softmax and sums by segment, stable top-k, means over what is real."""

import pytest
import torch

from loramux.core.router import (
    mean_over,
    segment_softmax,
    segment_sum,
    switch_balance,
    top_k_mask,
    top_k_stable,
)

SEGMENT = torch.tensor([0, 1, 0, 1, 1, 3])


def test_a_softmax_by_segment_is_the_softmax_of_each_segments_kept_entries():
    score = torch.randn(6, dtype=torch.float64) * 1000  # exp of it would overflow
    keep = torch.tensor([True, True, True, False, True, True])
    share = segment_softmax(score, SEGMENT, keep, 4)
    for segment in (0, 1, 3):
        mine = (segment == SEGMENT) & keep
        torch.testing.assert_close(share[mine], score[mine].softmax(0))
    assert share[3] == 0


def test_a_segment_with_nothing_kept_gets_zeros_and_no_nan():
    score = torch.randn(6, requires_grad=True)
    share = segment_softmax(score, SEGMENT, torch.zeros(6, dtype=torch.bool), 4)
    assert share.eq(0).all()
    share.sum().backward()
    assert score.grad.isfinite().all()


def test_the_gradient_of_a_softmax_by_segment_is_that_of_the_softmax():
    score = torch.randn(6, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda s: segment_softmax(s, SEGMENT, keep, 4).square(), [score]
    )


def test_a_sum_by_segment_adds_the_rows_of_each():
    value = torch.randn(6, 3)
    total = segment_sum(value, SEGMENT, 4)
    torch.testing.assert_close(total[0], value[0] + value[2])
    torch.testing.assert_close(total[1], value[1] + value[3] + value[4])
    assert total[2].eq(0).all()


def test_ties_go_to_the_lower_index_and_the_best_comes_first():
    score = torch.tensor([[0.2, 0.3, 0.2, 0.3, 0.0], [0.0] * 5])
    assert top_k_stable(score, 3).tolist() == [[1, 3, 0], [0, 1, 2]]


def test_means_leave_out_what_is_not_real():
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]])
    assert mean_over(value, torch.tensor([True, True, False])).tolist() == [2.0, 3.0]
    assert mean_over(value, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_the_balance_of_ties_counts_the_lower_index():
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert switch_balance(p, torch.ones(2, dtype=torch.bool)).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_mask_of_the_best_is_the_stable_choice_also_where_scores_tie(
    dtype: torch.dtype, k: int
):
    draw = torch.Generator().manual_seed(0)
    for scores in (torch.randn(40, 8, generator=draw), torch.randint(3, (40, 8), generator=draw)):
        score_NE = scores.to(dtype)
        expected = torch.zeros(40, 8, dtype=torch.bool)
        expected.scatter_(1, top_k_stable(score_NE, k), True)
        assert torch.equal(top_k_mask(score_NE, k), expected)
