"""`generate`: prompts in, texts and token ids out."""

import pytest
import torch

from loramux.errors import LoramuxError
from loramux.eval.generate import generate, generate_model
from pico import build_pico, pico_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def test_results_have_prompt_text_and_tokens_in_order(base, tokenizer):
    prompts = ["one more", "a", "what is this?"]
    result = generate(base, prompts=prompts, max_tokens=6, batch_size=2)
    assert set(result) == {"results", "base", "adapter", "seconds"}
    assert [r["prompt"] for r in result["results"]] == prompts
    for row in result["results"]:
        assert set(row) == {"prompt", "text", "tokens"}
        assert row["text"] == tokenizer.decode(row["tokens"], skip_special_tokens=True)
        assert 0 < len(row["tokens"]) <= 6


def test_greedy_text_equals_transformers_own(base, tokenizer):
    model = build_pico("llama")
    ids = tokenizer("hello", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    (row,) = generate(base, prompts=["hello"], max_tokens=8)["results"]
    assert row["tokens"] == out[0, 5:].tolist()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "hi"),
        ({"template": "task"}, "Question: hi\nAnswer:"),
        ({"template": "chat"}, "<|user|>hi<|assistant|>"),
    ],
)
def test_the_prompt_is_taken_as_it_is_unless_a_template_is_named(tokenizer, options, text):
    model, seen = build_pico("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    generate_model(model, tokenizer, ["hi"], max_tokens=1, **options)
    assert seen[0].tolist() == [tokenizer(text)["input_ids"]]


def test_sampling_repeats_with_its_seed(tokenizer):
    model = build_pico("llama")
    options = {"max_tokens": 12, "temperature": 3.0}
    first = generate_model(model, tokenizer, ["hello"], seed=1, **options)
    assert first == generate_model(model, tokenizer, ["hello"], seed=1, **options)
    assert first != generate_model(model, tokenizer, ["hello"], seed=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": [""]}, "has no tokens"),
        ({"chat": True, "template": "task"}, "exclude each other"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 400}, "256 positions"),
        ({"top_p": 0.5}, "top_p needs a temperature"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(base, options, message):
    with pytest.raises(ValueError, match=message):
        generate(base, **({"prompts": ["hi"]} | options))


def test_a_base_without_chat_template_refuses_chat():
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(LoramuxError, match="no chat template"):
        generate_model(build_pico("llama"), tokenizer, ["hi"], template="chat")


def test_threads_are_set_for_the_process(base):
    before = torch.get_num_threads()
    try:
        generate(base, prompts=["hi"], max_tokens=1, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
