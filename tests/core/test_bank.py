"""Rows of an adapter at a site: spans, gathers, moments, fresh starts and DoRA's gain."""

import pytest
import torch
from torch import Tensor

from loramux.core.bank import (
    Rows,
    dora_gain,
    fresh_rows,
    gather_moments,
    gather_rows,
    init_a,
    weight_norm,
)
from loramux.core.types import Expert, Site
from loramux.ops.contract import Spans

SITE = Site("l.0.x", "x", 0, "l.0", "l.0", "other", "plain", 6, 5, 6)


def bank(ranks: tuple[int, ...] = (3, 0, 2), scales: tuple[float, ...] = (1.0, 2.0, 0.5)) -> Rows:
    rows = sum(ranks)
    a = torch.arange(rows * 6.0).view(rows, 6)
    return Rows(Spans.packed(ranks, scales), a, -torch.arange(rows * 5.0).view(rows, 5))


def delta(rows: Rows) -> list[Tensor]:
    """s B^T A of every slot, [O, I]."""
    return [
        scale * rows.b[rows.slot_rows(slot)].T @ rows.a[rows.slot_rows(slot)]
        for slot, scale in enumerate(rows.spans.scale)
    ]


def test_spans_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(ValueError, match="own 5 rank rows, but A has 4"):
        Rows(Spans.packed((3, 2), (1.0, 1.0)), torch.zeros(4, 6), torch.zeros(5, 5))


def test_a_gather_moves_rows_of_one_slot_and_leaves_the_others():
    rows = bank()
    before, kept = delta(rows), (rows.a.clone(), rows.b.clone())
    take = rows.gather_ranks(0, [2, 2, 0])
    assert take.tolist() == [2, 2, 0, 3, 4]
    assert rows.spans.rank == (3, 0, 2) and rows.spans.start == (0, 3, 3)
    assert rows.spans.scale == (1.0, 2.0, 0.5)
    torch.testing.assert_close(rows.a[:3], kept[0][[2, 2, 0]])
    torch.testing.assert_close(rows.b[:3], kept[1][[2, 2, 0]])
    torch.testing.assert_close(delta(rows)[2], before[2])


def test_a_slot_may_shrink_to_nothing_and_grow_from_nothing():
    rows = bank()
    before = delta(rows)
    assert rows.gather_ranks(0, []).tolist() == [3, 4]
    assert rows.spans.rank == (0, 0, 2)
    torch.testing.assert_close(delta(rows)[2], before[2])
    assert rows.gather_ranks(1, [-1, -1]).tolist() == [-1, -1, 0, 1]
    assert rows.spans.rank == (0, 2, 2)
    assert rows.b[:2].abs().max() == 0 and rows.a[:2].abs().min() > 0
    torch.testing.assert_close(delta(rows)[2], before[2])


@pytest.mark.parametrize("index", [[3], [0, -2]])
def test_rows_a_slot_does_not_have_are_refused(index: list[int]):
    rows = bank()
    before = rows.a.clone()
    with pytest.raises(ValueError, match=r"slot 0 has rows 0\.\.2"):
        rows.gather_ranks(0, index)
    assert torch.equal(rows.a, before)


def test_fresh_ranks_come_from_the_generator_they_are_given():
    drawn = []
    for seed in (1, 1, 2):
        rows = bank()
        rows.gather_ranks(2, [-1], torch.Generator().manual_seed(seed))
        drawn.append(rows.a[-1].clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 1 / 6**0.5


def test_a_gather_keeps_whether_rows_are_trained():
    rows = bank()
    rows.gather_ranks(0, [0])
    assert not rows.a.requires_grad
    rows.requires_grad_(True)
    rows.gather_ranks(0, [0])
    assert rows.a.requires_grad and rows.b.requires_grad and rows.a.is_leaf


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adagrad"])
def test_moments_follow_the_rows_and_fresh_rows_start_at_zero(kind: str):
    rows = bank()
    rows.requires_grad_(True)
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    }
    optimizer = make[kind]([{"params": [rows.a]}, {"params": [rows.b], "lr": 0.01}])
    rows.a.grad, rows.b.grad = torch.randn_like(rows.a), torch.randn_like(rows.b)
    optimizer.step()
    old, state = rows.a, dict(optimizer.state[rows.a])
    take = rows.gather_ranks(0, [2, 0, -1, 2])
    gather_moments(optimizer, old, rows.a, take)
    assert old not in optimizer.state
    assert optimizer.param_groups[0]["params"] == [rows.a]
    assert optimizer.param_groups[1]["lr"] == 0.01
    for key, value in optimizer.state[rows.a].items():
        if torch.is_tensor(value) and value.dim() == 2:
            torch.testing.assert_close(value, gather_rows(state[key], take))
            assert value[2].abs().max() == 0
        else:
            assert value == state[key]
    rows.a.grad = torch.ones_like(rows.a)
    optimizer.step()


def test_moments_that_were_never_made_need_no_gather():
    rows = bank()
    optimizer = torch.optim.AdamW([rows.a, rows.b])
    old = rows.a
    gather_moments(optimizer, old, rows.a, rows.gather_ranks(0, [1]))
    assert not optimizer.state


def test_experts_start_with_random_a_zero_b_and_equal_magnitudes():
    weight = torch.randn(5, 6)
    rows = fresh_rows(SITE, [Expert(2, 1.5), Expert(3, 0.5)], magnitude_O=weight_norm(weight))
    assert rows.spans.rank == (2, 3) and rows.spans.scale == (1.5, 0.5)
    assert rows.b.abs().max() == 0 and rows.a.abs().min() > 0
    assert rows.a.dtype == rows.b.dtype == torch.float32
    torch.testing.assert_close(rows.magnitude, weight.norm(dim=1).expand(2, 5))
    torch.testing.assert_close(dora_gain(rows, weight), torch.ones(2, 5))


def test_the_start_of_a_is_pefts():
    """Kaiming uniform with a = sqrt(5): uniform within 1 / sqrt(d_in); gaussian: standard deviation 1 / rank."""
    a = init_a(64, 256, torch.Generator().manual_seed(0))
    assert a.abs().max() <= 1 / 16
    assert a.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    gaussian = fresh_rows(SITE, [Expert(500, 1.0)], gaussian=True).a
    assert gaussian.std().item() == pytest.approx(1 / 500, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gain_of_dora_is_magnitude_over_the_dense_norm(dtype: torch.dtype):
    weight = torch.randn(5, 6, dtype=dtype)
    rows = Rows(
        Spans.packed((3, 0, 2), (1.0, 2.0, 0.5)),
        torch.randn(5, 6, dtype=dtype),
        torch.randn(5, 5, dtype=dtype),
        torch.rand(3, 5, dtype=dtype),
    )
    expected = torch.stack(
        [m / (weight + d).norm(dim=1) for m, d in zip(rows.magnitude, delta(rows), strict=True)]
    )
    torch.testing.assert_close(dora_gain(rows, weight), expected)
    rows.requires_grad_(True)
    dora_gain(rows, weight).sum().backward()
    assert rows.a.grad is None and rows.magnitude.grad is not None
