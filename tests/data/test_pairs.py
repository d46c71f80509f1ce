"""Preference rows: one prompt, two answers, in every form they are written in; a wrong row is named with its line."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.data import Example, load_pairs
from loramux.errors import DataError
from loramux.recipe import DataSource, Template, TextTemplate

USER, YES, NO = (
    {"role": "user", "content": "is it?"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no way"},
)


def load(
    path: str, tokenizer: Any, template: Template = "task", length: int = 512
) -> list[Example]:
    return load_pairs(DataSource(path=path), tokenizer, template, length)


def texts(tokenizer: Any, example: Example) -> tuple[str, str]:
    """(what is not supervised, what is)."""
    ids = list(zip(example.input_ids, example.loss_mask, strict=True))
    return (
        tokenizer.decode([token for token, flag in ids if not flag]),
        tokenizer.decode([token for token, flag in ids if flag]),
    )


def test_texts_are_taken_as_they_are_and_end_with_the_end_token(
    tokenizer: Any, write_jsonl: Any
) -> None:
    path = write_jsonl({"prompt": "Is it?", "chosen": " yes", "rejected": " no", "task": "t"})
    chosen, rejected = load(path, tokenizer)
    assert texts(tokenizer, chosen) == ("Is it?", " yes<|im_end|>")
    assert texts(tokenizer, rejected) == ("Is it?", " no<|im_end|>")
    assert chosen.task == rejected.task == "t"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "is it?", "chosen": [YES], "rejected": [NO]},
    ],
    ids=["messages", "conversations", "text and messages"],
)
def test_messages_supervise_the_answer_alone(
    tokenizer: Any, write_jsonl: Any, row: dict[str, Any]
) -> None:
    chosen, rejected = load(write_jsonl(row), tokenizer)
    prompt, answer = texts(tokenizer, chosen)
    assert answer == "yes<|im_end|>"
    assert "is it?" in prompt
    assert texts(tokenizer, rejected)[1] == "no way<|im_end|>"


def test_earlier_turns_of_the_assistant_are_prompt(tokenizer: Any, write_jsonl: Any) -> None:
    history = [USER, YES, {"role": "user", "content": "sure?"}]
    path = write_jsonl({"prompt": history, "chosen": [NO], "rejected": [YES]})
    chosen, rejected = load(path, tokenizer)
    assert texts(tokenizer, chosen)[1] == "no way<|im_end|>"
    assert texts(tokenizer, rejected)[1] == "yes<|im_end|>"
    size = sum(chosen.prompt_mask)
    assert chosen.input_ids[:size] == rejected.input_ids[: sum(rejected.prompt_mask)]


def test_a_chat_template_takes_plain_texts_too(tokenizer: Any, write_jsonl: Any) -> None:
    path = write_jsonl({"prompt": "is it?", "chosen": "yes", "rejected": "no"})
    prompt, answer = texts(tokenizer, load(path, tokenizer, "chat")[0])
    assert prompt.startswith("<|im_start|>user")
    assert answer == "yes<|im_end|>"


def test_a_task_row_sets_its_answer_against_one_of_the_other_choices(
    tokenizer: Any, write_jsonl: Any
) -> None:
    rows = [
        {"task": "t", "id": str(i), "prompt": f"q{i}", "choices": ["a", "b", "c"], "answer": "b"}
        for i in range(12)
    ]
    path = write_jsonl(*rows)
    made = load(path, tokenizer)
    assert {texts(tokenizer, row)[1] for row in made[::2]} == {" b<|im_end|>"}
    assert {texts(tokenizer, row)[1] for row in made[1::2]} == {" a<|im_end|>", " c<|im_end|>"}
    assert texts(tokenizer, made[0])[0] == "Question: q0\nAnswer:"
    assert made == load(path, tokenizer)


def test_both_prompts_are_cut_to_what_the_longer_answer_leaves(
    tokenizer: Any, write_jsonl: Any
) -> None:
    path = write_jsonl({"prompt": "x" * 30 + "end", "chosen": "abcdef", "rejected": "g"})
    chosen, rejected = load(path, tokenizer, length=12)
    assert texts(tokenizer, chosen) == ("xxend", "abcdef<|im_end|>")
    assert texts(tokenizer, rejected) == ("xxend", "g<|im_end|>")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' missing"),
        ({"prompt": "a", "completion": "b"}, "'chosen' and 'rejected' missing"),
        ({"chosen": "b", "rejected": "c"}, "'prompt' must be a non-empty text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen' must be a non-empty text"),
        ({"prompt": "a", "chosen": [YES], "rejected": "b"}, "both be texts or both be messages"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "must differ in what"),
        ({"chosen": [YES], "rejected": [NO]}, "no prompt in front"),
        ({"prompt": 3.5, "chosen": [YES], "rejected": [NO]}, "a text or a list of messages"),
        ({"prompt": [{"role": "me"}], "chosen": [YES], "rejected": [NO]}, "list of messages"),
        ({"prompt": "a", "chosen": [YES], "rejected": []}, "non-empty list"),
        ({"prompt": "a", "choices": ["b"], "answer": "b"}, "at least two"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(
    tokenizer: Any, write_jsonl: Any, row: dict[str, Any], says: str
) -> None:
    path = write_jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(DataError, match=says) as caught:
        load(path, tokenizer)
    assert f"{path}:2" in str(caught.value)


def test_templates_of_ones_own_are_refused(tokenizer: Any, write_jsonl: Any) -> None:
    path = write_jsonl({"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match="taken as they are"):
        load(path, tokenizer, TextTemplate(prompt="{prompt}", completion="{chosen}"))
