"""Only what the assistant says is supervised, and a template that hides where that is gets refused."""

from __future__ import annotations

from typing import Any

import pytest

from data.byte_tokenizer import CHATML, build_tokenizer
from loramux.data import DataSource, load_examples
from loramux.data.chat import encode_chat
from loramux.errors import DataError

TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "dos"},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the text of earlier assistant turns, as templates of reasoning models do.
FORGETFUL = CHATML.replace(
    "m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else '') +"
)


def spoken(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    ids, mask = encode_chat(tokenizer, messages, "here")
    parts: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(ids, mask, strict=True)):
        if flag and (i == 0 or not mask[i - 1]):
            parts.append([])
        if flag:
            parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "markers"])
def test_every_assistant_turn_and_its_end_token_are_supervised(template: str) -> None:
    assert spoken(build_tokenizer(template), TURNS) == ["uno<|im_end|>", "dos<|im_end|>"]


def test_prefixes_and_markers_give_the_same_tokens() -> None:
    plain = encode_chat(build_tokenizer(CHATML), TURNS, "here")
    marked = encode_chat(build_tokenizer(MARKED), TURNS, "here")
    assert plain == marked


def test_the_prompt_of_a_conversation_ends_at_the_first_assistant_turn(
    write_jsonl: Any, tokenizer: Any
) -> None:
    (example,) = load_examples(DataSource(path=write_jsonl({"messages": TURNS})), tokenizer)
    prompt = [i for i, flag in zip(example.input_ids, example.prompt_mask, strict=True) if flag]
    asked = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == asked


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 3: the chat template rewrites earlier turns"):
        encode_chat(build_tokenizer(FORGETFUL), TURNS, "row 3")
    assert spoken(build_tokenizer(FORGETFUL), TURNS[:3]) == ["uno<|im_end|>"]


def test_a_conversation_that_is_too_long_loses_its_oldest_exchange_first(
    write_jsonl: Any, tokenizer: Any
) -> None:
    whole = len(encode_chat(tokenizer, TURNS, "here")[0])
    (example,) = load_examples(
        DataSource(path=write_jsonl({"messages": TURNS})), tokenizer, sequence_len=whole - 1
    )
    kept = tokenizer.apply_chat_template([TURNS[0], *TURNS[3:]], tokenize=False)
    assert tokenizer.decode(example.input_ids) == kept


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "user", "content": "a"}], "no assistant message"),
        ([{"role": "bot", "content": "a"}], "message 0 needs a 'role'"),
        ([{"role": "user", "content": None}], "message 0 needs a text 'content', got None"),
        ([{"role": "assistant", "content": "a"}], "starts with the assistant"),
    ],
)
def test_a_bad_conversation_is_one_error_with_file_and_line(
    write_jsonl: Any, tokenizer: Any, messages: Any, message: str
) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{message}"):
        load_examples(DataSource(path=write_jsonl({"messages": messages})), tokenizer)


def test_a_refusal_of_the_template_itself_is_passed_on() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation: roles must alternate"):
        encode_chat(build_tokenizer(strict), TURNS, "here")


def test_a_tokenizer_without_a_chat_template_is_named() -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        encode_chat(build_tokenizer(None), TURNS, "here")
