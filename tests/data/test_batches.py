"""Batches: the plan is fixed by its seed, padding is on the right, packing changes nothing that is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.data import Example, collate, collate_packed, first_fit, plan_batches, segment_mask
from loramux.errors import DataError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def example(length: int, answer: int = 2, start: int = 3) -> Example:
    ids = [(start + i) % 90 + 3 for i in range(length)]
    return Example.build("t", ids, [i >= length - answer for i in range(length)])


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_visits_every_row_once(lengths: list[int], size: int, seed: int) -> None:
    for grouped in (True, False):
        plan = plan_batches(lengths, size, seed=seed, epochs=1, group_by_length=grouped)
        assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
        assert max(map(len, plan)) <= size


@given(LENGTHS, st.integers(1, 9), st.integers(1, 50))
def test_a_longer_plan_starts_like_a_shorter_one(
    lengths: list[int], size: int, wanted: int
) -> None:
    plan = plan_batches(lengths, size, seed=1, num_batches=wanted)
    longer = plan_batches(lengths, size, seed=1, num_batches=wanted + 7)
    assert len(plan) == wanted and longer[:wanted] == plan


def test_the_seed_decides_the_order_and_epochs_differ() -> None:
    lengths = list(range(1, 65))
    one = plan_batches(lengths, 4, seed=0, epochs=2)
    assert one == plan_batches(lengths, 4, seed=0, epochs=2)
    assert one != plan_batches(lengths, 4, seed=1, epochs=2)
    assert one[:16] != one[16:]
    assert len(plan_batches(lengths, 4, seed=0, epochs=0.5)) == 8


def test_grouping_by_length_saves_padding() -> None:
    lengths = [(7 * i) % 64 + 1 for i in range(512)]

    def padded(plan: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in plan)

    grouped = padded(plan_batches(lengths, 8, seed=0, epochs=1))
    mixed = padded(plan_batches(lengths, 8, seed=0, epochs=1, group_by_length=False))
    assert grouped < 0.75 * mixed


def test_a_plan_needs_exactly_one_end() -> None:
    with pytest.raises(ValueError, match="exactly one of epochs and num_batches"):
        plan_batches([1], 1, seed=0)
    with pytest.raises(ValueError, match="cannot plan"):
        plan_batches([], 1, seed=0, epochs=1)


@given(LENGTHS, st.integers(40, 90))
def test_packed_rows_hold_every_example_once_and_never_overflow(
    lengths: list[int], max_len: int
) -> None:
    rows = first_fit(lengths, max_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= max_len
    # First fit: two rows that would fit together are never both open.
    assert sum(2 * u <= max_len for u in used) <= 1


def test_an_example_longer_than_a_packed_row_is_refused() -> None:
    with pytest.raises(DataError, match="41 tokens does not fit a packed row of 40"):
        first_fit([3, 41], 40)


def test_padding_is_on_the_right_and_supervises_nothing() -> None:
    batch = collate([example(5), example(3)], pad_token_id=0)
    assert batch["input_ids"][1].tolist() == [6, 7, 8, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [-100, 7, 8, -100, -100]
    assert batch["prompt_mask"].tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4]
    assert batch["prompt_mask"].dtype is torch.bool


def test_an_end_token_equal_to_the_padding_token_stays_supervised() -> None:
    tail = Example.build("t", [5, 6, 0], [False, True, True])
    assert collate([tail], pad_token_id=0)["labels"].tolist() == [[-100, 6, 0]]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        collate([], pad_token_id=0)


def test_packed_positions_restart_and_segments_are_counted_per_row() -> None:
    batch = collate_packed([[example(3), example(2, 1)], [example(4)]], pad_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert batch["labels"][0].tolist() == [-100, 7, 8, -100, 7]


def test_a_packed_query_sees_its_own_past_and_nothing_else() -> None:
    mask = segment_mask(torch.tensor([[0, 0, 1, -1, -1]]))[0, 0].int()
    assert mask.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_packing_gives_every_example_the_logits_it_has_alone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    examples = [example(n, start=n) for n in (7, 4, 6, 3)]
    packed = collate(examples, pad_token_id=0, packing=True, max_len=11)
    assert packed["input_ids"].shape == (2, 11)
    inputs = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        logits = model(**{key: packed[key] for key in inputs}).logits
        for row, order in enumerate(first_fit([len(e) for e in examples], 11)):
            at = 0
            for i in order:
                alone = model(input_ids=torch.tensor([examples[i].input_ids])).logits[0]
                torch.testing.assert_close(logits[row, at : at + len(alone)], alone)
                at += len(alone)


def test_batches_of_one_epoch_come_in_no_order_of_length() -> None:
    lengths = list(range(1, 65))
    longest = [max(lengths[i] for i in b) for b in plan_batches(lengths, 4, seed=0, epochs=1)]
    assert longest != sorted(longest)
