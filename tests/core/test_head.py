"""The head of an attached model."""

import torch

import loramux
from pico import build_pico


def test_the_head_gets_the_last_positions_in_one_piece():
    model = build_pico("llama")
    seen: list[bool] = []
    handle = loramux.attach(model, loramux.LoraConfig())
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous())
    )
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), logits_to_keep=1)
    assert seen == [True]
    handle.detach()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), logits_to_keep=1)
    assert seen == [True, False]
