"""Short half-precision rows on CPU take the plain formula, everything else torch's own choice; the loss is the same."""

import pytest
import torch

from loramux.data import collate
from loramux.train.attention import PLAIN_TOKENS, fastest_attention, prefers_plain
from loramux.train.loss import SupervisedForward
from pico import PAD, build_pico
from train.toys import examples

CPU = torch.device("cpu")


def test_only_short_half_precision_rows_on_cpu_take_the_plain_formula() -> None:
    assert prefers_plain(CPU, torch.bfloat16, PLAIN_TOKENS)
    assert not prefers_plain(CPU, torch.bfloat16, PLAIN_TOKENS + 1)
    assert not prefers_plain(CPU, torch.float32, 8)
    assert not prefers_plain(torch.device("cuda"), torch.bfloat16, 8)


def test_the_choice_ends_with_the_block() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with fastest_attention(CPU, torch.bfloat16, 8):
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_both_kernels_give_the_loss_to_rounding() -> None:
    model = build_pico("llama", dtype=torch.bfloat16)
    forward = SupervisedForward(model)
    batch = collate(examples(8), PAD)
    plain, count = forward(batch)
    with fastest_attention(CPU, torch.bfloat16, 16):
        chosen, _ = forward(batch)
    assert (chosen / count).item() == pytest.approx((plain / count).item(), abs=2e-2)
