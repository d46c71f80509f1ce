"""Rows of an adapter at a site: spans, gathers, fresh starts and DoRA's gain. Moments: test_edits.py."""

import pytest
import torch
from torch import Tensor

from loramux.core.adapter import Adapter
from loramux.core.bank import (
    Rows,
    dora_gain,
    fresh_rows,
    init_a,
    weight_norm,
)
from loramux.core.edits import Editor
from loramux.core.types import Expert, Site
from loramux.methods.lora import METHOD, LoraConfig
from loramux.ops.contract import Spans

SITE = Site("l.0.x", "x", 0, "l.0", "l.0", "other", "plain", 6, 5, 6)


def bank(ranks: tuple[int, ...] = (3, 0, 2), scales: tuple[float, ...] = (1.0, 2.0, 0.5)) -> Rows:
    rows = sum(ranks)
    a = torch.arange(rows * 6.0).view(rows, 6)
    return Rows(Spans.packed(ranks, scales), a, -torch.arange(rows * 5.0).view(rows, 5))


def editor_of(rows: Rows) -> Editor:
    adapter = Adapter("default", METHOD(LoraConfig()), {SITE.path: SITE}, {SITE.path: rows}, {})
    optimizer = torch.optim.AdamW([rows.a, rows.b])
    return Editor(adapter, optimizer, adapter.trainable(), torch.Generator().manual_seed(0))


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
    editor_of(rows).gather(SITE.path, 0, [2, 2, 0])
    assert rows.spans.rank == (3, 0, 2) and rows.spans.start == (0, 3, 3)
    assert rows.spans.scale == (1.0, 2.0, 0.5)
    torch.testing.assert_close(rows.a[:3], kept[0][[2, 2, 0]])
    torch.testing.assert_close(rows.b[:3], kept[1][[2, 2, 0]])
    torch.testing.assert_close(delta(rows)[2], before[2])


def test_a_slot_may_shrink_to_nothing_and_grow_from_nothing():
    rows = bank()
    before = delta(rows)
    editor_of(rows).gather(SITE.path, 0, [])
    assert rows.spans.rank == (0, 0, 2)
    torch.testing.assert_close(delta(rows)[2], before[2])
    editor_of(rows).gather(SITE.path, 1, [-1, -1])
    assert rows.spans.rank == (0, 2, 2)
    assert rows.b[:2].abs().max() == 0 and rows.a[:2].abs().min() > 0
    torch.testing.assert_close(delta(rows)[2], before[2])


@pytest.mark.parametrize("index", [[3], [0, -2]])
def test_rows_a_slot_does_not_have_are_refused(index: list[int]):
    rows = bank()
    before = rows.a.clone()
    with pytest.raises(ValueError, match=r"slot 0 has rows 0\.\.2"):
        editor_of(rows).gather(SITE.path, 0, index)
    assert torch.equal(rows.a, before)


def test_a_gather_keeps_whether_rows_are_trained():
    rows = bank()
    editor_of(rows).gather(SITE.path, 0, [0])
    assert not rows.a.requires_grad
    rows.requires_grad_(True)
    editor_of(rows).gather(SITE.path, 0, [0])
    assert rows.a.requires_grad and rows.b.requires_grad and rows.a.is_leaf


def test_moments_that_were_never_made_need_no_gather():
    rows = bank()
    editor = editor_of(rows)
    editor.gather(SITE.path, 0, [1])
    assert not editor.optimizer.state


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
