"""The pico models themselves: same seed same bits, awake logits, generation without a warning."""

import pytest
import torch

from oracles.surgery import base_weight, decoder_layers, linear_sites
from pico import FAMILIES, VOCAB, build_pico, pico_tokenizer

IDS = torch.tensor([[5, 17, 40, 61, 8], [90, 33, 12, 7, 70]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_bits_and_another_seed_another_model(family):
    before = torch.random.get_rng_state()
    first, again, other = build_pico(family), build_pico(family), build_pico(family, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first(IDS).logits, again(IDS).logits)
    assert (first(IDS).logits - other(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_give_clearly_different_logits_and_generation_is_silent(family):
    model = build_pico(family)
    logits = model(IDS).logits
    assert not model.training
    assert logits.shape[-1] == VOCAB
    assert logits.std() > 0.4
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 0.5
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False
    )
    assert out.shape[0] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_found_in_both_layers_and_weights_read_as_out_by_in(family):
    model = build_pico(family)
    assert len(decoder_layers(model)) == 2
    for layer in decoder_layers(model).values():
        for name in linear_sites(layer):
            module = layer.get_submodule(name)
            W, bias = base_weight(module)
            x = torch.randn(3, W.shape[1])
            y = x @ W.T if bias is None else x @ W.T + bias
            torch.testing.assert_close(y, module(x))


def test_text_survives_the_tokenizer_and_a_split_point_is_a_token_boundary():
    tokenizer = pico_tokenizer()
    text = "Question: Is 2+2=4?\nAnswer: yes"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text[:9]).input_ids + tokenizer(text[9:]).input_ids == ids
    assert max(ids) < VOCAB
    assert len(tokenizer) <= VOCAB
    assert tokenizer("~").input_ids == [tokenizer.unk_token_id]


def test_the_chat_template_marks_exactly_the_assistant_tokens():
    tokenizer = pico_tokenizer()
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    assert tokenizer.decode(out["input_ids"]) == "<|user|>hi<|assistant|>yo<eos>"
    assert out["assistant_masks"] == [0, 0, 0, 0, 1, 1, 1]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == out["input_ids"][: len(prompt)]
