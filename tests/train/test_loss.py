"""The forward pass of training gives the model's own loss, and computes logits only where there is a label."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import loramux
from loramux.data import collate
from loramux.train.loss import SupervisedForward, num_tokens
from pico import FAMILIES, PAD, build_pico
from train.toys import examples


def summed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The definition: all logits, shifted labels, fp32."""
    call = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**call).logits[:, :-1].float()
    return functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_the_full_logits_in_every_family(family: str) -> None:
    model = build_pico(family)
    batch = collate(examples(5), PAD)
    forward = SupervisedForward(model)
    with forward.hooked():
        loss, count = forward(batch)
    assert count == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(loss, summed(model, batch), rtol=1e-6, atol=0)


def test_soft_capped_logits_are_capped() -> None:
    model = build_pico("gemma3", final_logit_softcapping=0.2)
    batch = collate(examples(3), PAD)
    forward = SupervisedForward(model)
    with forward.hooked():
        loss, _ = forward(batch)
    torch.testing.assert_close(loss, summed(model, batch), rtol=1e-6, atol=0)
    assert abs(loss - summed(build_pico("gemma3"), batch)) > 0.1


def test_the_head_sees_supervised_positions_only_and_other_calls_see_all() -> None:
    model = build_pico("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1].numel()))
    batch = collate(examples(4), PAD)
    forward = SupervisedForward(model)
    with forward.hooked():
        _, count = forward(batch)
        model(batch["input_ids"])
    model(batch["input_ids"])
    assert seen == [count, batch["input_ids"].numel(), batch["input_ids"].numel()]


def test_without_the_hook_the_sum_is_the_same() -> None:
    model = build_pico("llama")
    batch = collate(examples(4), PAD)
    torch.testing.assert_close(SupervisedForward(model)(batch)[0], summed(model, batch))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_loss_of_separate_ones(family: str, attention: str) -> None:
    """Rows are longer than gemma3's sliding window of 16."""
    model = build_pico(family, attn_implementation=attention)
    torch.manual_seed(0)
    handle = loramux.attach(model, loramux.MiLoRAConfig(r=4, top_k=2))
    for parameter in handle.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = examples(7)
    forward = SupervisedForward(model)
    packed = collate(rows, PAD, packing=True, max_len=48)
    assert packed["input_ids"].shape[0] < len(rows)
    with forward.hooked():
        alone = sum(forward(collate([row], PAD))[0] for row in rows)
        together, count = forward(packed)
    assert count == sum(row.num_supervised for row in rows)
    torch.testing.assert_close(together, torch.as_tensor(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_not_counted_as_tokens(packing: bool) -> None:
    rows = examples(5)
    assert num_tokens(collate(rows, PAD, packing=packing)) == sum(map(len, rows))
