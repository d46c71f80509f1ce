"""What is read off a model call: requests, prompt tokens, real tokens, and a micro-batch's share of its step."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from loramux.core.batch import read_batch, supervised_share

IDS = torch.arange(10).view(2, 5)
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def read(prompt_mask: Any = None, segment_ids: Any = None, **call: Any) -> Any:
    return read_batch({"input_ids": IDS, **call}, prompt_mask, segment_ids)


def test_without_anything_every_token_is_a_real_prompt_token():
    batch = read()
    assert batch.lead == (2, 5) and batch.num_tokens == 10 and batch.num_requests == 2
    assert batch.request_N.tolist() == [0] * 5 + [1] * 5
    assert batch.prompt_N.all() and batch.valid_N.all()
    assert batch.past_length == 0


def test_padding_is_neither_real_nor_prompt():
    batch = read(attention_mask=MASK)
    assert torch.equal(batch.valid_N, MASK.bool().reshape(-1))
    assert torch.equal(batch.prompt_N, batch.valid_N)


def test_the_prompt_ends_before_the_first_supervised_token():
    labels = torch.tensor([[-100, -100, -100, 7, -100], [-100, 5, 6, -100, -100]])
    batch = read(attention_mask=MASK, labels=labels)
    expected = [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.prompt_N.view(2, 5).int().tolist() == expected


def test_a_sample_without_a_supervised_token_is_all_prompt():
    labels = torch.full((2, 5), -100)
    assert torch.equal(read(attention_mask=MASK, labels=labels).prompt_N, MASK.bool().reshape(-1))


def test_a_given_prompt_mask_wins_over_labels_but_not_over_padding():
    given = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    labels = torch.full((2, 5), 3)
    batch = read(prompt_mask=given, attention_mask=MASK, labels=labels)
    assert batch.prompt_N.view(2, 5).int().tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_segments_are_requests_of_their_own_and_minus_one_is_padding():
    segments = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]])
    labels = torch.tensor([[-100, 4, -100, 4, -100], [-100, -100, 3, 3, 3]])
    batch = read(segment_ids=segments, labels=labels)
    assert batch.num_requests == 6
    assert batch.request_N[batch.valid_N].tolist() == [0, 0, 1, 1, 3, 4, 4, 5, 5]
    assert batch.valid_N.int().tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    prompts = batch.prompt_N.view(2, 5).int().tolist()
    assert prompts == [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_positions_that_start_again_are_segments_where_nothing_is_padded():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    batch = read_batch({"input_ids": IDS[:1], "position_ids": positions}, None, None)
    assert batch.request_N.tolist() == [0, 0, 0, 1, 1]
    padded = {"input_ids": IDS[:1], "position_ids": positions, "attention_mask": MASK[:1]}
    assert read_batch(padded, None, None).num_requests == 1


def cache_of(length: int, rows: int = 2) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(rows, 1, length, 4), torch.zeros(rows, 1, length, 4), 0)
    return cache


def test_with_a_cache_the_tokens_are_an_answer_and_the_masks_last_columns_are_theirs():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1]])
    batch = read_batch(
        {"input_ids": IDS[:, :2], "attention_mask": mask, "past_key_values": cache_of(6)},
        None,
        None,
    )
    assert batch.past_length == 6
    assert not batch.prompt_N.any()
    assert batch.valid_N.view(2, 2).tolist() == [[True, True], [False, True]]


def test_an_empty_cache_is_a_prompt():
    assert read(past_key_values=DynamicCache()).prompt_N.all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_in_a_four_dimensional_mask_too(side: str, dtype: torch.dtype):
    """Static caches and compiled generation hand the model its causal mask ready made, longer than the tokens."""
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]])
    causal = torch.ones(5, 8).tril() * torch.nn.functional.pad(real, (0, 3))[:, None, None, :]
    mask = causal.bool()
    if dtype == torch.float32:
        mask = torch.zeros(2, 1, 5, 8).masked_fill(~mask, torch.finfo(dtype).min)
    batch = read(attention_mask=mask)
    assert torch.equal(batch.valid_N.view(2, 5), real.bool())


@pytest.mark.parametrize("name", ["prompt_mask", "segment_ids"])
def test_masks_of_another_shape_are_refused_with_both_shapes(name: str):
    with pytest.raises(ValueError, match=rf"{name}.*\(2, 5\).*\(2, 4\)"):
        read(**{name: torch.ones(2, 4, dtype=torch.long)})


def test_a_call_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without input_ids or inputs_embeds"):
        read_batch({}, None, None)


def test_embeddings_count_as_tokens():
    batch = read_batch({"inputs_embeds": torch.zeros(3, 4, 8)}, None, None)
    assert batch.lead == (3, 4)


def test_the_share_of_a_micro_batch_is_by_supervised_tokens_after_the_shift():
    labels = torch.tensor([[3, 3, -100, 3], [-100, -100, -100, 5]])
    assert supervised_share({"labels": labels}) == 1.0
    share = supervised_share({"labels": labels, "num_items_in_batch": torch.tensor(12)})
    assert float(share) == pytest.approx(3 / 12)
    shifted = {"shift_labels": labels, "num_items_in_batch": 12}
    assert float(supervised_share(shifted)) == pytest.approx(4 / 12)
