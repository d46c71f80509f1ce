"""Tokens to FFN rows and back, even or ragged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loramux.ops import rows as ops
from loramux.ops.contract import RowMap

EVEN = [0, 0, 1, 1, 2, 2]
SINGLE = [0, 1, 2]
RAGGED = [0, 0, 0, 1, 2, 2]
MIXED = [2, 0, 1, 0, 2, 0]


def row_map(token: list[int], uniform: int | None = None) -> RowMap:
    weight = torch.linspace(0.2, 1.1, len(token), dtype=torch.float64)
    return RowMap(torch.tensor(token, dtype=torch.int32), weight, 3, uniform)


def fold_by_hand(x: Tensor, rows: RowMap) -> Tensor:
    out = [torch.zeros(x.shape[1], dtype=x.dtype) for _ in range(rows.num_tokens)]
    for m, token in enumerate(rows.token.tolist()):
        out[token] = out[token] + rows.weight[m] * x[m]
    return torch.stack(out)


@pytest.mark.parametrize("token", [EVEN, SINGLE, RAGGED, MIXED])
def test_every_row_is_a_copy_of_its_token(token: list[int]) -> None:
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    out = ops.to_rows(y, row_map(token))
    assert torch.equal(out, y[token])
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, y, grad)
    (want,) = torch.autograd.grad(y[token], y, grad)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("token", [EVEN, SINGLE, RAGGED, MIXED])
def test_rows_fold_with_their_weights_and_gradients_follow(token: list[int]) -> None:
    rows = row_map(token)
    rows.weight.requires_grad_()
    x = torch.randn(len(token), 5, dtype=torch.float64, requires_grad=True)
    out, want = ops.fold_rows(x, rows), fold_by_hand(x, rows)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    for got, expected in zip(
        torch.autograd.grad(out, [x, rows.weight], grad),
        torch.autograd.grad(want, [x, rows.weight], grad),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_folding_frozen_rows_gives_gradients_to_the_weights_alone() -> None:
    rows = row_map(EVEN)
    rows.weight.requires_grad_()
    out = ops.fold_rows(torch.ones(6, 4, dtype=torch.float64), rows)
    out.sum().backward()
    assert rows.weight.grad is not None and rows.weight.grad.tolist() == [4.0] * 6


def test_even_rows_are_recognized_once_and_promises_are_believed() -> None:
    assert ops.rows_per_token(row_map(EVEN)) == 2
    assert ops.rows_per_token(row_map(SINGLE)) == 1
    assert ops.rows_per_token(row_map(RAGGED)) is None
    assert ops.rows_per_token(row_map(MIXED)) is None
    assert ops.rows_per_token(row_map(EVEN, uniform=2)) == 2
    seen = row_map(EVEN)
    ops.rows_per_token(seen)
    seen.token = torch.tensor(MIXED, dtype=torch.int32)
    assert ops.rows_per_token(seen) == 2


def test_bf16_rows_stay_bf16() -> None:
    rows = row_map(EVEN)
    assert ops.to_rows(torch.randn(3, 4).bfloat16(), rows).dtype is torch.bfloat16
    assert ops.fold_rows(torch.randn(6, 4).bfloat16(), rows).dtype is torch.bfloat16
