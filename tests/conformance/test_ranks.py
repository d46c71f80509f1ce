"""Invariant 10: every edit of the ranks is a gather; the function, the optimizer's moments and the scale follow."""

import pytest
import torch
from torch import nn

import loramux
from conformance.cases import (
    IDS,
    LABELS,
    MASK,
    Maker,
    Variant,
    every_variant,
    logits_of,
)
from loramux.core.bank import Rows
from loramux.core.edits import Editor
from pico import build_pico

TIED = ("hydralora",)  # experts that share one A have no ranks of their own
VARIANTS = [pytest.param(v, id=v.name) for v in every_variant() if v.method not in TIED]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


Banks = dict[str, Rows]


def attached(make: Maker, variant: Variant) -> tuple[nn.Module, loramux.Handle, Banks]:
    model = build_pico("llama")
    handle = make.attach(model, variant)
    return model, handle, handle.adapters["default"].rows


def edit(handle: loramux.Handle, path: str, slot: int, index: list[int]) -> None:
    adapter = handle.adapters["default"]
    optimizer = torch.optim.SGD(list(adapter.parameters()))
    Editor(adapter, optimizer, adapter.trainable(), torch.Generator()).gather(path, slot, index)


@pytest.mark.parametrize("method", TIED)
def test_ranks_of_experts_that_share_one_a_cannot_be_edited(make: Maker, method: str):
    (variant,) = (v for v in every_variant() if v.method == method)
    _, handle, banks = attached(make, variant)
    with pytest.raises(ValueError, match="share one A"):
        edit(handle, next(iter(banks)), 0, [0])


def slots(rows: Rows) -> list[int]:
    return [slot for slot in range(rows.spans.num_slots) if rows.spans.rank[slot]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_in_another_order_compute_the_same(make: Maker, variant: Variant):
    model, handle, banks = attached(make, variant)
    expected = logits_of(model)
    for path, rows in banks.items():
        for slot in slots(rows):
            edit(handle, path, slot, list(reversed(range(rows.spans.rank[slot]))))
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_duplicated_and_halved_ranks_compute_the_same(make: Maker, variant: Variant):
    model, handle, banks = attached(make, variant)
    expected = logits_of(model)
    for path, rows in banks.items():
        scales = rows.spans.scale
        for slot in slots(rows):
            rank = rows.spans.rank[slot]
            edit(handle, path, slot, [*range(rank), 0, rank - 1])
            at = rows.slot_rows(slot)
            with torch.no_grad():
                halved = [0, rank - 1, rank, rank + 1] if rank > 1 else [0, 1, 2]
                share = 2 if rank > 1 else 3
                rows.b[at][halved] /= share
        assert rows.spans.scale == scales
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_ranks_whose_b_is_zero_computes_the_same(make: Maker, variant: Variant):
    model, handle, banks = attached(make, variant)
    for rows in banks.values():
        for slot in slots(rows):
            rows.b.data[rows.slot_rows(slot)][-1] = 0
    expected = logits_of(model)
    for path, rows in banks.items():
        before, full = rows.spans.num_rows, slots(rows)
        for slot in full:
            edit(handle, path, slot, list(range(rows.spans.rank[slot] - 1)))
        assert rows.a.shape[0] == rows.b.shape[0] == rows.spans.num_rows
        assert rows.spans.num_rows == before - len(full)
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_ranks_compute_the_same_until_they_are_trained(make: Maker, variant: Variant):
    model, handle, banks = attached(make, variant)
    expected = logits_of(model)
    for path, rows in banks.items():
        for slot in slots(rows):
            edit(handle, path, slot, [*range(rows.spans.rank[slot]), -1, -1])
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    one = next(iter(banks.values()))
    if variant.method_class.trains_rows:
        assert one.a.requires_grad and one.b.requires_grad
    first = one.a[one.slot_rows(slots(one)[0])]
    assert first[-2:].abs().min() > 0
    assert not torch.equal(first[-2], first[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_may_be_edited_between_two_decode_steps(make: Maker, variant: Variant):
    """Whatever a decode step keeps ready for the next one must notice new rows."""
    logits = []
    for is_edited in (False, True):
        model = build_pico("llama")
        handle = make.attach(model, variant, backend="auto")
        with torch.no_grad():
            cache = model(IDS[:1, :4], use_cache=True).past_key_values
            for token in (5, 6, 7):
                model(torch.tensor([[token]]), past_key_values=cache)
            for path, rows in handle.adapters["default"].rows.items() if is_edited else ():
                for slot in slots(rows):
                    edit(handle, path, slot, [*reversed(range(rows.spans.rank[slot])), -1])
            logits.append(model(torch.tensor([[8]]), past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    "variant",
    [p for p in VARIANTS if p.values[0].method_class.trains_rows],  # type: ignore[union-attr]
)
def test_training_goes_on_as_before_when_ranks_and_moments_change_places(
    make: Maker, variant: Variant
):
    logits = []
    for is_edited in (False, True):
        model, handle, _ = attached(make, variant)
        # A plain list, as the stock Trainer builds it: the optimizer must be told of new parameters.
        optimizer = torch.optim.AdamW(handle.trainable_parameters().values(), lr=1e-3)
        train(model, optimizer, 2)
        if is_edited:
            adapter = handle.adapters["default"]
            parameters = handle.trainable_parameters()
            editor = Editor(adapter, optimizer, parameters, torch.Generator())
            for path, rows in adapter.rows.items():
                for slot in slots(rows):
                    editor.gather(path, slot, list(reversed(range(rows.spans.rank[slot]))))
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert known == {id(p) for p in handle.trainable_parameters().values()}
        train(model, optimizer, 2)
        logits.append(logits_of(model))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
